"""Dropped units that leave the model at once, while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.utils import logging

from ..compaction import compact_model
from ..parallel import Shards
from ..proof import VerificationError
from ..structures import Masks, Structure
from .dropped_units import DroppedUnits, Step
from .live_proof import compact_proven, is_costly
from .model_shape import ModelShape
from .weight_copies import find_copy
from .zeroed_units import ZeroedUnits

logger = logging.get_logger(__name__)

ZEROS = "Dropped units stay in the model as zeros until it is saved: {}."
_NOT_CALLED = "the model was not called as a module in the step, or only with a cache"


class RemovedUnits:
    """Dropped units that leave the model at once: one of the ways to apply masks while training.

    The model, the optimizer's state for it and its shape record shrink at every pruning step, so that training speeds
    up, and a checkpoint holds a slim model. It is the same training, since dropped units contribute nothing.

    Args:
        shape: Which units the model has.
        shards: Where the weights are.
        is_required: Whether nothing but live compaction will do, so that dropped units never stay as zeros.
    """

    removes = True
    is_settled = True

    def __init__(self, shape: ModelShape, shards: Shards, *, is_required: bool) -> None:
        """See the class."""
        self.shape = shape
        self._shards = shards
        self._is_required = is_required
        self._has_warned = False

    def settle(self, model: nn.Module, optimizer: Any, structures: Sequence[Structure]) -> DroppedUnits:
        """It stays as it is."""
        return self

    def apply(self, model: nn.Module, masks: Masks, optimizer: Any, step: Step) -> DroppedUnits:
        """Remove the units, or leave them as zeros if they cannot go; see `DroppedUnits`.

        Where a proof costs more than a training step, only the last pruning step and those that take units from a
        structure for the first time are proven.
        """
        shrinking = self.shape.find_shrinking(masks)
        if not shrinking:
            return self
        if not self._is_required:
            copy = find_copy(model, shrinking, (getattr(optimizer, "optimizer", optimizer), *step.others))
            if copy is not None:
                logger.info(ZEROS.format(copy))
                return self._keep_zeros(model, masks, optimizer, step)
        try:
            self._remove(model, shrinking, masks, optimizer, step)
        except VerificationError as error:
            if self._is_required:
                raise
            logger.warning(
                f"{error} All is as it was before, and dropped units stay in the model as zeros from here on. It "
                "cannot be made smaller with these structures: leave them out with slim_exclude."
            )
            return self._keep_zeros(model, masks, optimizer, step)
        return self

    def hold(self, model: nn.Module, optimizer: Any = None) -> None:
        """Nothing has to be held: what is gone cannot come back."""

    def restore(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Nothing can have come back."""
        return []

    def _remove(
        self, model: nn.Module, shrinking: Sequence[Structure], masks: Masks, optimizer: Any, step: Step
    ) -> None:
        left = self.shape.narrow_masks(masks)
        gap = None
        if not step.is_last and is_costly(model) and all(map(self.shape.is_proven, shrinking)):
            structures = compact_model(model, shrinking, left, optimizer)
        elif step.calls:
            structures, reached, gap = compact_proven(model, shrinking, left, optimizer, step.calls)
            self.shape.proven |= reached
        else:
            structures, gap = compact_model(model, shrinking, left, optimizer), _NOT_CALLED
        self.shape.follow(model, structures, masks)
        if gap is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(f"The removal of units is not proven on the batch of the training: {gap}.")

    def _keep_zeros(self, model: nn.Module, masks: Masks, optimizer: Any, step: Step) -> DroppedUnits:
        units = ZeroedUnits(self.shape, self._shards)
        return units.apply(model, masks, optimizer, step)
