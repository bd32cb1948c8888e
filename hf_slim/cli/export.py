"""`hf-slim export`: a slim model as a file for another runtime."""

from __future__ import annotations

from ..exports import export_gguf
from .model_source import check_place, load_config


def write_gguf(folder: str, out: str) -> str:
    """Write a GGUF file.

    Args:
        folder: The model: a folder or a Hub name.
        out: The file.

    Returns:
        Where the file lies, and what runs it.

    Raises:
        ValueError: If llama.cpp does not compute what the model computes, or gguf is not installed; nothing is
            written.
    """
    check_place("IN", folder)
    load_config(folder)
    try:
        path = export_gguf(folder, out)
    except ImportError as error:
        raise ValueError(str(error)) from error
    return f"The file lies in {path}. To run it: llama-cli -m {path}"
