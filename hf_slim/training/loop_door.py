"""The door of a `Slimmer` for a loop of somebody's own: it goes along with the optimizer, and with checkpoints."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.optim import Optimizer

from ..arguments import SlimArgumentsMixin, SlimConfig, check_whole
from ..compaction import find_zero_units
from ..parallel import find_fixed_shapes
from .attached_optimizer import Attachable, AttachedOptimizer, attach_optimizer
from .loaded_weights import AwaitedWeights
from .plan import Settings, from_state
from .saved_state import take_loaded_shape

Door = TypeVar("Door", bound="LoopDoor")


class LoopDoor(Attachable):
    """What a loop of somebody's own asks of a `Slimmer`; see there.

    Args:
        model: The model as it is called.
        settings: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the whole training.
    """

    masks: dict[str, torch.Tensor]

    def __init__(self, model: nn.Module, settings: Settings, max_steps: int) -> None:
        """See the class."""
        self._settings = _read_settings(settings)
        check_whole("max_steps", max_steps)
        if not isinstance(model, nn.Module):
            raise ValueError(f"Slimmer takes the model that is trained, got {type(model).__name__}.")
        self.max_steps, self.step = max_steps, 0
        self._called = weakref.ref(model)
        self._model = weakref.ref(extract_model_from_parallel(model, keep_torch_compile=False))
        self._attached: AttachedOptimizer | None = None
        self._awaited = AwaitedWeights()

    @property
    def attached_to(self) -> Optimizer | None:
        """The optimizer that it is attached to."""
        return self._attached.optimizer if self._attached is not None else None

    @property
    def masks_left(self) -> dict[str, torch.Tensor]:
        """The masks of the units that are in the model, for each structure's name."""
        return self.shape.narrow_masks(self.masks)

    def find_masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The masks, True = keep, of the units that are in the model; none if it has other tensors by now."""
        is_known = not self.shape.is_unnamed and self.shape.fits(model, is_same=True)
        return self.masks_left if is_known else {}

    def refuse_more_steps(self) -> None:
        """Refuse a step beyond the training that the schedule was made for.

        Raises:
            RuntimeError: If all steps are done.
        """
        if self.step >= self.max_steps:
            raise RuntimeError(
                f"max_steps={self.max_steps} optimizer steps are done, and the loop goes on: give Slimmer the steps "
                "of the whole training (batches of an epoch over accumulated batches, times epochs), or call detach() "
                "after the last of them, which keeps what was dropped known to save_slimmed."
            )

    def refuse_missing_weights(self) -> None:
        """Refuse to go on with a state that was loaded without its weights.

        Raises:
            RuntimeError: If that is so.
        """
        model = self._find_models()[1]
        if self._awaited.are_missing(model):
            raise RuntimeError(
                "The Slimmer's state was loaded without the weights of its checkpoint: those of the model are other "
                "ones, in which units that were dropped there are not zero. Call load_state_dict of the model after "
                "that of the Slimmer."
            )
        self._awaited.end()
        self.restore_zeros(model, self.attached_to)

    @abstractmethod
    def begin(
        self, model: nn.Module, begin: int, saved: Mapping[str, Any] | None, optimizer: Any, obstacle: Any
    ) -> None:
        """Begin, or go on from what was saved."""

    @abstractmethod
    def close(self) -> None:
        """Leave the optimizer and the model's hooks as they were."""

    @abstractmethod
    def restore_zeros(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Write zeros again where something is not."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold."""

    def attach(self: Door, optimizer: Any) -> Door:
        """Score, drop units and keep them out at every step of an optimizer from here on.

        Args:
            optimizer: The one optimizer of the model, or what accelerate or Lightning has wrapped around it; before or
                after `Accelerator.prepare`.

        Returns:
            This.

        Raises:
            ValueError: If this or another Slimmer is attached already, the optimizer does not have all weights that
                are slimmed in its `param_groups`, `slim_live=True` where shapes cannot change, or the settings ask for
                a teacher.
        """
        called, model = self._find_models()
        are_missing = self._awaited.are_missing(model)
        self._attached = attach_optimizer(self, self._settings, called, model, optimizer)
        self._await(model, are_missing)  # anew, since attaching writes zeros
        return self

    def detach(self) -> None:
        """Let the optimizer step without this; `save_slimmed` still knows what was dropped."""
        if self._attached is not None:
            self.restore_zeros(self._find_models()[1], self._attached.optimizer)
            self._attached.detach()
            self._attached = None
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, with the zeros looked at again: plain data for `torch.save`."""
        self.shape.refuse_unnamed()
        if self._attached is not None:
            self.restore_zeros(self._find_models()[1], self._attached.optimizer)
        return {**self.to_state(), "step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, before or after its weights and its optimizer's state are loaded.

        Args:
            state_dict: What `state_dict` gave, in a training of the same settings. If units had left the model, the
                model takes its shape; where its weights were loaded before, this had to be attached by then.

        Raises:
            ValueError: If it is damaged, or of other settings, another model or another number of steps.
        """
        called, model = self._find_models()
        obstacle = find_fixed_shapes(called) or find_fixed_shapes(model)
        has_loaded = self._attached is not None and self._attached.has_loaded
        steps = self.max_steps
        has_units = take_loaded_shape(model, state_dict, steps, self.shape, obstacle, has_loaded=has_loaded)
        used = find_zero_units(model, map(self.shape.find_current, self.masks), whole=True)
        self.close()
        self.begin(model, 0, state_dict, None, obstacle)
        has_zeros = not any((used[name] & ~mask).any() for name, mask in self.masks_left.items())
        self._await(model, not (has_units and has_zeros))
        self.step = state_dict["step"]
        if self._attached is not None:
            self._attached.begin()

    def _await(self, model: nn.Module, are_missing: bool) -> None:
        """Wait for the weights of a state, if they are not there."""
        self._awaited.end()
        if are_missing:
            structures = map(self.shape.find_current, self.masks)
            self._awaited.wait(model, [member.tensor for s in structures for member in s.members])

    def _find_models(self) -> tuple[nn.Module, nn.Module]:
        """The model as it is called, and the one in whatever is wrapped around it."""
        called, model = self._called(), self._model()
        if model is None:
            raise RuntimeError("The model of this Slimmer is gone: keep the model, or make both anew.")
        return model if called is None else called, model


def _read_settings(settings: Any) -> Settings:
    if isinstance(settings, SlimArgumentsMixin):
        return settings if isinstance(settings, SlimConfig) else SlimConfig.from_arguments(settings)
    if not isinstance(settings, (list, tuple)):
        raise ValueError(
            "Slimmer takes a SlimConfig or the list that parse_auto_slim_config returns, got "
            f"{type(settings).__name__}."
        )
    from_state(settings)  # which checks the entries
    return settings
