"""How masks are applied while a model trains: what zeroed, undecided and removed units have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..structures import Masks, Structure
from .captured_batch import Call


class Step(NamedTuple):
    """What is known of the step at whose end masks are applied.

    Args:
        calls: How the model was called on its batch.
        is_last: Whether it is the last pruning step.
        others: Callbacks, which may keep copies of weights.
    """

    calls: Sequence[Call] = ()
    is_last: bool = True
    others: Iterable[Any] = ()


class DroppedUnits(Protocol):
    """Dropped units, in the model as zeros or gone from it."""

    @property
    def removes(self) -> bool:
        """Whether units leave the model, now or later."""

    @property
    def is_settled(self) -> bool:
        """Whether it is known how masks are applied, so that `settle` changes nothing."""

    def settle(self, model: nn.Module, optimizer: Any, structures: Sequence[Structure]) -> DroppedUnits:
        """Choose how masks are applied from here on, once the optimizer's state is known.

        Args:
            model: The model.
            optimizer: The optimizer, after a step.
            structures: The structures that will lose units, as they were before anything was dropped.

        Returns:
            What applies them.

        Raises:
            RuntimeError: If units cannot leave the model, and nothing else will do.
        """

    def apply(self, model: nn.Module, masks: Masks, optimizer: Any, step: Step) -> DroppedUnits:
        """Drop the units that masks drop.

        Args:
            model: The model; changed in place.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; units that are gone
                already are dropped in it.
            optimizer: The optimizer, if there is one already; its state is changed like the weights.
            step: The step.

        Returns:
            What applies masks from here on.

        Raises:
            RuntimeError: If the optimizer's state cannot be cut; nothing has been changed then.
            VerificationError: If the model computes something else without the units, and they must not stay as
                zeros; nothing has been changed then.
        """

    def hold(self, model: nn.Module, optimizer: Any = None) -> None:
        """Keep zeros zero, after an optimizer step and before its gradients are gone.

        Args:
            model: The model; changed in place.
            optimizer: The optimizer.
        """

    def restore(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Look at the zeros, and write them again where something else has written over them.

        Args:
            model: The model; changed in place. It may be a copy of the one that is trained.
            optimizer: The optimizer, if there is one.

        Returns:
            The names of the structures of which units had come back, as far as this process holds them.
        """
