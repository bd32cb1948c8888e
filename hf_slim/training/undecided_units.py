"""How masks are applied in a training: chosen in one place, when it begins and once the optimizer's state is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..compaction import find_state_slices
from ..parallel import Shards
from ..structures import Structure
from .dropped_units import DroppedUnits
from .model_shape import ModelShape
from .plan import Plan
from .removed_units import ZEROS, RemovedUnits
from .zeroed_units import ZeroedUnits

logger = logging.get_logger(__name__)


class UndecidedUnits(ZeroedUnits):
    """Dropped units that stay as zeros until it is known whether the optimizer's state can be cut like the weights.

    Most optimizers have no state before their first step.

    Args:
        shape: Which units the model has.
        shards: Where the weights are.
        is_required: Whether nothing but live compaction will do.
    """

    removes = True
    is_settled = False

    def __init__(self, shape: ModelShape, shards: Shards, *, is_required: bool) -> None:
        """See the class."""
        super().__init__(shape, shards)
        self._is_required = is_required

    def settle(self, model: nn.Module, optimizer: Any, structures: Sequence[Structure]) -> DroppedUnits:
        """Take live compaction if the optimizer's state can be cut; see `DroppedUnits`."""
        obstacle = _find_state_obstacle(model, optimizer, self.shape, structures)
        if obstacle is None:
            return RemovedUnits(self.shape, self._shards, is_required=self._is_required)
        if self._is_required:
            raise RuntimeError(
                f"slim_live=True cannot be used here: {obstacle}. Use another optimizer, or slim_live=False."
            )
        logger.info(ZEROS.format(obstacle))
        return ZeroedUnits(self.shape, self._shards)


def choose_units(
    plan: Plan,
    shape: ModelShape,
    shards: Shards,
    model: nn.Module,
    optimizer: Any,
    *,
    obstacle: str | None,
    keeps_zeros: bool,
) -> DroppedUnits:
    """Choose how masks are applied in a training that is about to begin.

    Args:
        plan: What is to be removed.
        shape: Which units the model has. If some have left it, nothing but live compaction can go on.
        shards: Where the weights are.
        model: The model.
        optimizer: The optimizer; before its first step, most have no state.
        obstacle: Why shapes cannot change in this training, if that is known.
        keeps_zeros: Whether dropped units have stayed as zeros in an earlier part of this training.

    Returns:
        What applies them.

    Raises:
        ValueError: If units cannot leave the model, and nothing else will do.
    """
    obstacle = obstacle or _find_norm(plan.structures)
    if obstacle is None and shape.has_removed:
        obstacle = _find_state_obstacle(model, optimizer, shape, plan.structures)
    is_required = plan.live is True
    if obstacle is not None and plan.targets and (is_required or shape.has_removed):
        asked = "slim_live=True" if is_required else "Live compaction, as before in this training,"
        raise ValueError(
            f"{asked} cannot be used here: {obstacle}. Build the model anew and start or resume with that; where "
            "shapes cannot change, train with slim_live=False."
        )
    if keeps_zeros or plan.live is False or obstacle is not None or not plan.targets:
        return ZeroedUnits(shape, shards)
    return UndecidedUnits(shape, shards, is_required=is_required)


def _find_norm(structures: Iterable[Structure]) -> str | None:
    for structure in structures:
        for member in structure.members:
            if member.role == "norm":
                return (
                    f"{member.tensor} normalizes over all units of {structure.name}, so that removing some rescales "
                    "it, and an optimizer would go on differently"
                )
    return None


def _find_state_obstacle(
    model: nn.Module, optimizer: Any, shape: ModelShape, structures: Iterable[Structure]
) -> str | None:
    """Why an optimizer's state cannot be sliced like the parameters."""
    members = (member for s in structures for member in shape.find_current(s.name).members)
    places = dict.fromkeys((member.tensor, member.dim) for member in members)
    return next(iter(find_state_slices(optimizer, model, places)[1].values()), None) or _find_flat_state(optimizer)


def _find_flat_state(optimizer: Any) -> str | None:
    """What an optimizer keeps for all parameters together, as L-BFGS does under the first one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for parameter, state in inner.state.items() if inner is not None else ():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() > parameter.numel():
                return f"{type(inner).__name__} keeps the state {key!r} for several parameters together"
    return None
