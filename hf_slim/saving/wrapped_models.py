"""Modules that hold transformers models, save themselves, and are loaded again by their class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compaction import copy_modules, find_pretrained, has_remote_code
from ..parallel import share_tensors
from ..proof import RUN_ERRORS, VerificationError
from ..structures import has_adapters


class Saved(NamedTuple):
    """Where a transformers model was saved, and whether the remote-code file lies beside it."""

    model: PreTrainedModel
    folder: Path
    has_remote_code: bool


def can_save(model: nn.Module) -> bool:
    """Whether a module holds transformers models and can save itself."""
    return _find_saver(model) is not None and bool(find_pretrained(model))


def copy_model(model: nn.Module) -> nn.Module:
    """Copy the modules of a model; weights are shared until one of the two is given new ones, as `model_slim` does.

    What else a module around the transformers models holds is shared with the copy: it may hold on to a trainer and
    its data.

    Args:
        model: The model.

    Returns:
        The copy; what it computes and saves does not touch the model. With adapters, whose merging changes weights
        where they are, it has weights of its own.
    """
    return copy_modules(model, {} if has_adapters(model) else share_tensors(model))


def save_container(model: nn.Module, folder: Path, max_shard_size: int | str | None = None) -> list[Saved]:
    """Save a module by its own method.

    Args:
        model: A transformers model, or a module that holds such.
        folder: The folder.
        max_shard_size: Size from which on the weights are split into several files; only for a transformers model.

    Returns:
        Where the transformers models lie.

    Raises:
        ValueError: If the weights of a container are to be split, or if the module saves a transformers model in a
            way that loses its shape.
    """
    keywords = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    if keywords and not isinstance(model, PreTrainedModel):
        raise ValueError(f"max_shard_size={max_shard_size!r} cannot be used with a {type(model).__name__}.")
    with _watching(find_pretrained(model)) as places:
        save = _find_saver(model)
        assert save is not None
        save(str(folder), **keywords)
    for part in find_pretrained(model):
        if not any(saved is part for saved, _ in places):
            raise ValueError(
                f"{type(model).__name__} does not save the {type(part).__name__} in it by save_pretrained, so that "
                "its shape would be lost. Pass the transformers model itself to save_slimmed. Nothing was saved."
            )
    return [Saved(part, place, has_remote_code(part.config)) for part, place in places]


def check_container(model: nn.Module, folder: Path) -> None:
    """Refuse a folder that the class of a container does not load with the same weights, bit for bit.

    Args:
        model: The slim container, no transformers model itself.
        folder: Where it was saved.

    Raises:
        VerificationError: If it does not load, or with other weights.
    """
    cls: Any = type(model)
    try:
        loaded = getattr(cls, "from_pretrained", cls)(str(folder)).state_dict()
    except (*RUN_ERRORS, OSError) as error:
        raise VerificationError(
            f"{cls.__name__} does not load what it saved: {error} Nothing was saved. Save it by model_slim and its "
            "own method, or pass verify=False."
        ) from error
    expected = model.state_dict()
    for key in sorted(expected.keys() | loaded.keys()):
        if key not in loaded or key not in expected or not _is_same(expected[key], loaded[key]):
            raise VerificationError(
                f"{cls.__name__} loads another {key} from the saved folder than the slim one has. Nothing was saved."
            )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def _find_saver(model: nn.Module) -> Callable[[str], Any] | None:
    return getattr(model, "save_pretrained", None) or getattr(model, "save", None)


@contextmanager
def _watching(parts: list[PreTrainedModel]) -> Iterator[list[tuple[PreTrainedModel, Path]]]:
    """See in which folders models are saved."""
    places: list[tuple[PreTrainedModel, Path]] = []

    def watch(part: PreTrainedModel) -> Callable[..., Any]:
        original = part.save_pretrained

        def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            places.append((part, Path(save_directory)))
            return original(save_directory, *args, **kwargs)

        return save_pretrained

    try:
        for part in parts:
            part.__dict__["save_pretrained"] = watch(part)
        yield places
    finally:
        for part in parts:
            part.__dict__.pop("save_pretrained", None)
