"""Weight files that are damaged, found without reading the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open


def find_damaged_weights(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, str]]:
    """Find the safetensors files of a folder that are cut off or of another format, without reading the weights.

    Args:
        folder: The folder; nothing is found if there is none.

    Yields:
        The files, each with what is wrong with it.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            yield path, str(error)
