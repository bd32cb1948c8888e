"""The checkpoint that a training resumes from: the last whole one, and whether its files are whole."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..parallel import find_fixed_shapes
from .callback import find_saved, find_state
from .damaged_weight_files import find_damaged_weights
from .model_shape import ModelShape, find_shape
from .saved_state import read_masks

logger = logging.get_logger(__name__)


def find_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The last checkpoint of a training that was written to its end.

    The first process writes `trainer_state.json` last, and every process the state of its random numbers. A checkpoint
    without one of these, or with a part of it, is what a training leaves behind that is killed while it saves.

    Args:
        output_dir: The folder of the training.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If there is none.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    found.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for path in found:
        if not _is_cut_off(path):
            if path is not found[0]:
                logger.warning(f"{found[0]} was not written to its end, so training resumes from {path}.")
            return str(path)
    why = f": {found[0] / TRAINER_STATE_NAME} is missing or cut off" if found else ""
    raise ValueError(f"No valid checkpoint found in output directory ({output_dir}){why}. Train from the start.")


def check_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint with a damaged file. Weights and states are not read, only whether they are whole.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: If a file is cut off or not of its format; the message names it.
    """
    for path, problem in _find_damaged(Path(folder)):
        raise ValueError(f"{path} is damaged: {problem}. Resume from another checkpoint, or delete this one.")


def choose_checkpoint(resume_from_checkpoint: Any, output_dir: str | os.PathLike[str]) -> Any:
    """The checkpoint that a training with a `SlimTrainerCallback` resumes from, a whole one.

    Args:
        resume_from_checkpoint: What `Trainer.train` was given under this name.
        output_dir: The folder of the training.

    Returns:
        What `Trainer.train` is to take in its place: the last whole checkpoint for True, anything else as it is.

    Raises:
        ValueError: If there is no whole checkpoint, or the one given has a damaged file.
    """
    if resume_from_checkpoint is True:
        resume_from_checkpoint = find_whole_checkpoint(output_dir)
    if isinstance(resume_from_checkpoint, (str, os.PathLike)) and os.path.isdir(resume_from_checkpoint):
        check_checkpoint(resume_from_checkpoint)
    return resume_from_checkpoint


def restore_shape(model: nn.Module, folder: str | os.PathLike[str], args: TrainingArguments) -> None:
    """Give a model the shape that it had in a checkpoint, before the weights are loaded.

    Args:
        model: The model; changed in place where dropped units had left it in the checkpoint, or have left it since.
        folder: The checkpoint.
        args: The arguments of the training.

    Raises:
        ValueError: If the checkpoint is of another model, or shapes cannot change in this training.
    """
    saved = find_saved(TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME)).stateful_callbacks)
    shape = find_shape(model)
    if saved is None or not saved["live"]:
        if shape is not None:
            shape.take(model, {name: torch.ones_like(mask) for name, mask in shape.masks.items()})
        return
    obstacle = find_fixed_shapes(model, args)
    if obstacle is not None:
        raise ValueError(
            f"{folder} is a checkpoint of a training with live compaction, but {obstacle}. Resume on one device, or "
            "start another training from it as a model (from_pretrained)."
        )
    shape = shape or ModelShape(model)
    shape.take(model, read_masks(saved["dropped"], shape.masks))


def _is_cut_off(folder: Path) -> bool:
    path = folder / TRAINER_STATE_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.splitlines()[-1:] != ["}"]:
        return True
    return any(
        not zipfile.is_zipfile(folder / f"rng_state_{rank}.pth") for rank in range(_count_writers(folder, text))
    )


def _count_writers(folder: Path, text: str) -> int:
    """How many processes have written a state of random numbers of their own into a checkpoint."""
    if not (folder / "optimizer.pt").exists():
        return 0
    try:
        processes = find_state(json.loads(text)["stateful_callbacks"])["attributes"]["processes"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0  # not cut off, but damaged, or from before slimming was added
    return processes if isinstance(processes, int) and processes > 1 else 0


def _find_damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    state = folder / TRAINER_STATE_NAME
    if state.is_file():
        try:
            loaded = TrainerState.load_from_json(str(state))
            find_saved(loaded.stateful_callbacks)
            if type(loaded.global_step) is not int or loaded.global_step < 1:
                yield state, f"it says that {loaded.global_step!r} steps are done"
        except (ValueError, AttributeError, TypeError) as error:
            yield state, str(error)
    yield from find_damaged_weights(folder)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            gone = [name for name in sorted(shards) if not (folder / name).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            yield index, repr(error)
            continue
        for name in gone:
            yield index, f"it names {name}, which is not there"
    for path in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        if not zipfile.is_zipfile(path):
            yield path, "it is cut off, or not a file of torch.save"
