"""Whether dropped units can leave a model in the middle of a training, and what is said where they cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.utils import logging

from ..proof import VerificationError
from ..structures import Masks, Structure
from .captured_batch import Call
from .live_units import LiveUnits, find_live_obstacle, find_state_obstacle
from .weight_copies import find_copy

logger = logging.get_logger(__name__)


def find_obstacle(
    live: LiveUnits | None,
    model: nn.Module,
    optimizer: Any,
    structures: Sequence[Structure],
    obstacle: str | None,
    *,
    is_required: bool,
) -> str | None:
    """Say why units cannot be removed in a training that is about to begin.

    Args:
        live: The units of the model, if some have left it already and live compaction goes on.
        model: The model.
        optimizer: The optimizer; before its first step, most have no state.
        structures: The structures that will lose units.
        obstacle: What is known already.
        is_required: Whether nothing but live compaction will do.

    Returns:
        The reason, None if they can.

    Raises:
        ValueError: If they cannot, and it is required or goes on.
    """
    obstacle = obstacle or find_live_obstacle(structures)
    if obstacle is None and live is not None:
        obstacle = find_state_obstacle(optimizer, model, [live.current(s) for s in structures])
    if obstacle is not None and structures and (is_required or live is not None):
        asked = "slim_live=True" if is_required else "Live compaction, as before in this training,"
        raise ValueError(
            f"{asked} cannot be used here: {obstacle}. Build the model anew and start or resume with that; where "
            "shapes cannot change, train with slim_live=False."
        )
    return obstacle


def can_slice_state(model: nn.Module, optimizer: Any, structures: Iterable[Structure], *, is_required: bool) -> bool:
    """Find out whether an optimizer's state can be sliced like the parameters.

    Args:
        model: The model.
        optimizer: The optimizer, after a step: before, most have no state.
        structures: The structures that will lose units.
        is_required: Whether nothing but live compaction will do.

    Returns:
        True if it can; if not, that has been logged.

    Raises:
        RuntimeError: If it cannot and is required.
    """
    obstacle = find_state_obstacle(optimizer, model, structures)
    if obstacle is not None and is_required:
        raise RuntimeError(
            f"slim_live=True cannot be used here: {obstacle}. Use another optimizer, or slim_live=False."
        )
    if obstacle is not None:
        _log_zeros(obstacle)
    return obstacle is None


def remove_units(
    live: LiveUnits,
    model: nn.Module,
    masks: Masks,
    optimizer: Any,
    calls: Sequence[Call],
    is_required: bool,
    *,
    is_last: bool,
    others: Iterable[Any] = (),
) -> bool:
    """Let dropped units leave the model, if it computes the same without them, and nothing keeps copies of weights.

    Args:
        live: The units of the model.
        model: The model; changed in place.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        optimizer: The optimizer.
        calls: How the model was called on the batch of the step.
        is_required: Whether nothing but live compaction will do; then copies are left to fail by themselves.
        is_last: Whether this is the last pruning step.
        others: Callbacks, which may keep copies of weights.

    Returns:
        True if they have left. If not, all is as it was, and the reason has been logged.

    Raises:
        VerificationError: If the model computes something else without them, and it is required; all is as it was.
    """
    if not is_required:
        holders = (getattr(optimizer, "optimizer", optimizer), *others)
        copy = find_copy(model, live.find_shrinking(masks), holders)
        if copy is not None:
            _log_zeros(copy)
            return False
    try:
        live.apply(model, masks, optimizer, calls, is_last=is_last)
    except VerificationError as error:
        if is_required:
            raise
        logger.warning(
            f"{error} All is as it was before, and dropped units stay in the model as zeros from here on. It cannot "
            "be made smaller with these structures: leave them out with slim_exclude."
        )
        return False
    return True


def _log_zeros(reason: str) -> None:
    logger.info(f"Dropped units stay in the model as zeros until it is saved: {reason}.")
