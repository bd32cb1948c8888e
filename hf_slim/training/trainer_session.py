"""A Trainer that trains with a `SlimTrainerCallback`: what the callback knows of it, and its errors explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ..proof import VerificationError
from .callback import SlimTrainerCallback

_MISMATCH = re.compile(
    r"size mismatch|size of tensor|Sizes of tensors|output with shape|shape mismatch|shapes cannot be multiplied|"
    r"broadcast|same size|expected size|size does not match"
)
_OURS = (SlimTrainerCallback, CallbackHandler)


@contextmanager
def attending(trainer: Trainer) -> Iterator[None]:
    """Let a trainer's `SlimTrainerCallback` know the trainer while it trains, and explain sizes that do not match.

    Args:
        trainer: The trainer.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If sizes do not match after units have left the model; the message says what to do.
    """
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SlimTrainerCallback))
    callback.trainer = trainer
    try:
        yield
        callback.restore_zeros(trainer.model)  # callbacks after ours, and what a trainer does after all of them
    except RuntimeError as error:
        slimming = callback.slimming
        has_removed = slimming is not None and slimming.shape.has_removed
        if not has_removed or isinstance(error, VerificationError) or not _MISMATCH.search(str(error)):
            raise
        culprit = _find_culprit(error) or "something beside the model"
        raise RuntimeError(
            f"{error}. Units have left the model while it trained, and {culprit} seems to keep copies of weights in "
            "their former shapes, as averaged or slow weights: train with slim_live=False."
        ) from error
    finally:
        callback.trainer = None
        if callback.slimming is not None:
            callback.slimming.close()


def _find_culprit(error: BaseException) -> str | None:
    """The class of the last callback or optimizer on the way to an error."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, (TrainerCallback, Optimizer)) and not isinstance(owner, _OURS):
            found = type(owner).__name__
        trace = trace.tb_next
    return found
