"""The model that a command line names: its config, its class, and the model without or with its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..compaction import find_auto_classes
from ..proof import RUN_ERRORS
from .data import DataArguments, Task


def load_config(name: str, *, trust_remote_code: bool | None = False) -> PreTrainedConfig:
    """Load the config of a model; no weights are read.

    Args:
        name: A Hub name, a folder, or a .json file.
        trust_remote_code: Whether code that lies beside it may run; None asks, if it is needed.

    Returns:
        The config.

    Raises:
        ValueError: If there is none, or it is no config that transformers knows; the message is one line.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"The folder {name} holds no config.json: name the folder that a model was saved in.")
    if not path.exists():
        _check_hub_name(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (*RUN_ERRORS, OSError, StrictDataclassError) as error:
        where = name if path.exists() else f"{name}, which is no folder here and is asked for on the Hub"
        raise ValueError(f"There is no config to be had from {where}: {_in_one_line(error)}") from error


def find_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the class of the model that a config belongs to.

    Args:
        config: The config.

    Returns:
        The class of transformers that it names as its architecture, else the one that `AutoModel` builds from it.

    Raises:
        ValueError: If no Auto class knows the config.
    """
    found = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    for kind in found:
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    classes = find_auto_classes(config)
    if not classes:
        raise ValueError(f"transformers has no model for a {type(config).__name__}: name a model that it has.")
    return getattr(transformers, classes.get("AutoModel", next(iter(classes.values()))))


def build_without_weights(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Build the model of a config without values, at once and in no memory.

    Args:
        config: The config.
        name: What it was loaded from, for the message.

    Returns:
        The model, on the meta device.

    Raises:
        ValueError: If its class cannot be built from it; the message is one line.
    """
    kind: Any = find_model_class(config)
    try:
        with torch.device("meta"):
            model = kind(config)
    except (*RUN_ERRORS, ImportError, StrictDataclassError) as error:
        raise ValueError(f"The config of {name} builds no {kind.__name__}: {_in_one_line(error)}") from error
    model.tie_weights()
    return model.to("meta")  # some classes make a parameter on the CPU all the same


def load_model(name: str) -> PreTrainedModel:
    """Load a model by the class that its config names.

    Args:
        name: A Hub name or a folder.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there is none; the message is one line.
    """
    if Path(name).is_file():
        raise ValueError(f"{name} is a file: name the folder that the model was saved in.")
    config = load_config(name)
    named = next(iter(config.architectures or ()), None)
    kind: Any = find_model_class(config)
    if kind.__name__ != named:  # the class of another task would leave weights out
        raise ValueError(
            f"The config of {name} names {'no class' if named is None else f'the class {named}'}, which transformers "
            "does not have: load the model by its own class and call save_slimmed."
        )
    return load_weights(kind, name)


def load_weights(kind: Any, name: str, **keywords: Any) -> PreTrainedModel:
    """Load a model by a class that is known.

    Args:
        kind: The class, or an Auto class.
        name: A Hub name or a folder.
        keywords: For `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there are no weights, or they do not fit; the message is one line and names the first.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **keywords)
    except (*RUN_ERRORS, OSError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{name} cannot be loaded as {kind.__name__}: {_in_one_line(error)}") from error
    if found["mismatched_keys"]:
        key, saved, needed = min(found["mismatched_keys"])
        says = "the config with the labels of the data says" if "config" in keywords else "its config says"
        raise ValueError(
            f"{name} cannot be loaded as {type(model).__name__}: {key} is {tuple(saved)} in its weights, and {says} "
            f"{tuple(needed)}."
        )
    return model


def check_text_model(config: PreTrainedConfig, name: str, data: DataArguments, task: Task) -> None:
    """Refuse a model that reads no text, and a classifier where there are no labels and no task was named.

    Args:
        config: The config of the model.
        name: What it was loaded from, for the message.
        data: What was asked for.
        task: What is done with the data.

    Raises:
        ValueError: If it is one of these.
    """
    kind = next(iter(config.architectures or ()), type(config).__name__)
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        raise ValueError(f"{name}, a {kind}, reads no text: name a text model.")
    if task == "causal-lm" and data.task is None and kind.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{data.train_file} has no column 'label', and {name} is a {kind}: name the --label_column, or give "
            "--task causal-lm."
        )


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


def _check_hub_name(name: str) -> None:
    """Refuse what is not there and can be no name of the Hub."""
    if name.startswith((".", "~", os.sep)) or name.endswith(".json"):
        raise ValueError(f"There is no file or folder {name}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is no folder here and no name that the Hub can have, such as google-bert/bert-base-uncased: "
            f"{_in_one_line(error)}"
        ) from error


def _in_one_line(error: BaseException) -> str:
    """The first paragraph of a message."""
    return " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
