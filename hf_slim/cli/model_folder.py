"""The folder of a model, looked at before anything is done with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard
from transformers import AutoConfig, PreTrainedModel
from yaml import YAMLError  # type: ignore[import-untyped]

from ..modeling_hf_slim import RECORD_KEY, is_record

_TAG = "hf_slim"
_WEIGHTS = ("*.safetensors", "*.bin")


def check_slim_folder(folder: str) -> Path:
    """Refuse a folder that holds no slim model.

    Args:
        folder: The folder.

    Returns:
        Its path.

    Raises:
        ValueError: If it is not there, or holds no slim model; the message says what it lacks.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    config = path / "config.json"
    if not config.is_file() or not any(found for pattern in _WEIGHTS for found in path.glob(pattern)):
        lacking = "weights" if config.is_file() else "config.json"
        raise ValueError(f"{folder} holds no slim model: it has no {lacking}.")
    if not _has_sizes(_read(config)) and not _has_tag(load_card(path)):
        raise ValueError(
            f"{folder} holds no slim model: neither its config.json nor its README.md says so. To slim it, see "
            "`hf-slim compact` and `hf-slim prune`."
        )
    return path


def check_place(argument: str, name: str | None) -> None:
    """Refuse a name that can only be a path, since no Hub name looks like that, where there is nothing.

    Args:
        argument: What it was given as, such as `--model_name_or_path`.
        name: The name of a model or tokenizer, or a path.

    Raises:
        ValueError: If nothing is there.
    """
    if name is None or Path(name).exists():
        return
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith((".json", ".txt")):
        raise ValueError(f"{argument}: there is no file or folder {name}.")


def load_card(folder: Path) -> ModelCard | None:
    """Read the model card in a folder.

    Args:
        folder: The folder.

    Returns:
        The card; None if there is none.

    Raises:
        ValueError: If its metadata cannot be read.
    """
    path = folder / "README.md"
    try:
        return ModelCard.load(path) if path.is_file() else None
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The metadata at the head of {path} cannot be read: {error}. Mend or move it.") from error


def load_model(source: str) -> PreTrainedModel:
    """Load a model by the class that its config names.

    Args:
        source: A folder or a Hub name.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If its config names no class of transformers.
        OSError: If there is no such model.
    """
    config = AutoConfig.from_pretrained(source)
    name = next(iter(config.architectures or ()), None)
    found = getattr(transformers, name or "", None)
    if found is None:
        raise ValueError(
            f"The config of {source} names {'no class' if name is None else f'the class {name}'}, which transformers "
            "does not have: load the model by its own class and call save_slimmed."
        )
    return found.from_pretrained(source).eval()


def _has_tag(card: ModelCard | None) -> bool:
    return card is not None and _TAG in (card.data.get("tags") or ())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no config: it holds a {type(content).__name__}.")
    return content


def _has_sizes(config: dict[str, Any]) -> bool:
    """Whether a config, or one inside it, has a shape record or fields by layer."""
    if is_record(config.get(RECORD_KEY)) or config.get("per_layer_config"):
        return True
    return any(_has_sizes(part) for part in config.values() if isinstance(part, dict))
