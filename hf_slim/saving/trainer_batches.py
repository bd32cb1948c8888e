"""A batch of the data that a trainer trains or evaluates on."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..proof import RUN_ERRORS
from .wrapped_models import find_pretrained

logger = logging.get_logger(__name__)

ROWS = 8
SIZE = 2048
"""A batch is cut to so many rows, and to fewer where the rows are longer than this together."""
_LABELS = ("label", "labels", "label_ids")


def find_batch(trainer: Trainer, model: nn.Module) -> dict[str, Any] | None:
    """Take the first rows of a trainer's evaluation data, or of its training data if it has no other.

    They come through the trainer's own data loader, collator and all. Every process has to call this. Random numbers
    go on as if nothing had been drawn; of an iterable data set a new iterator is begun.

    Args:
        trainer: The trainer.
        model: The model that is to take them.

    Returns:
        Keyword arguments for the forward pass of the transformers model in it; None if the trainer has no data, or
        gives its batches not to that model as they are, but to a loss of its own.
    """
    parts = find_pretrained(model)
    evaluating = trainer.eval_dataset is not None
    data = trainer.eval_dataset if evaluating else trainer.train_dataset
    if len(parts) != 1 or data is None or (isinstance(data, dict) and not data):
        return None
    if isinstance(next(iter(data.values())) if isinstance(data, dict) else data, Iterator):
        logger.info("Compared on made inputs: the trainer's data can be read only once.")
        return None
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            batch = _read_batch(trainer, next(iter(data)) if isinstance(data, dict) else None, evaluating=evaluating)
    except RUN_ERRORS as error:
        logger.info(f"Compared on made inputs: the trainer's data give no batch: {error}")
        return None
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
    batch = _fit(batch, parts[0])
    if batch is None:
        logger.info(f"Compared on made inputs: the trainer's batches are not what {type(parts[0]).__name__} takes.")
    return batch


def _read_batch(trainer: Trainer, name: str | None, *, evaluating: bool) -> Any:
    """The first batch, on the trainer's device; the accelerator does not get to know of the loader."""
    prepared = trainer.accelerator._dataloaders
    known = len(prepared)
    loader: Any = trainer.get_eval_dataloader(name) if evaluating else trainer.get_train_dataloader()
    del prepared[known:]
    # What accelerate puts around the loader waits for other processes, and counts its batches as those of a training.
    batch = next(iter(getattr(loader, "base_dataloader", loader)), None)
    return Trainer._prepare_inputs(trainer, batch) if isinstance(batch, Mapping) and batch else None


def _fit(batch: Any, model: nn.Module) -> dict[str, Any] | None:
    """A few rows of a batch, if a model's forward pass has arguments for all that is in it; labels may be too many."""
    if not isinstance(batch, Mapping):
        return None
    parameters = inspect.signature(model.forward).parameters
    fitting = {name: value for name, value in batch.items() if name in parameters or name not in _LABELS}
    if not fitting or not parameters.keys() >= fitting.keys():
        return None
    tensors = [value for value in fitting.values() if isinstance(value, torch.Tensor)]
    if len(tensors) < len(fitting) or len({len(tensor) if tensor.dim() else 0 for tensor in tensors}) > 1:
        return fitting
    length = max((tensor.shape[1] for tensor in tensors if tensor.dim() > 1), default=1)
    rows = max(1, min(ROWS, SIZE // max(1, length)))
    return {name: tensor[:rows] if tensor.dim() else tensor for name, tensor in fitting.items()}
