"""Live compaction: dropped units are removed from the model while it trains."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..compaction import compact_model, find_pretrained, find_state_slices, own_configs, refresh_record
from ..modeling_hf_slim import set_sizes
from ..parallel import WholeTensors, change_tensor
from ..structures import Discovery, Masks, Structure, get_module, get_tensor, set_count
from .captured_batch import Call
from .live_proof import Proof, compact_proven, is_costly
from .masked_units import MaskedUnits

_LIVE: weakref.WeakKeyDictionary[nn.Module, LiveUnits] = weakref.WeakKeyDictionary()
"""The models that have been made smaller while they trained, or for a checkpoint of such a training."""
_NOT_CALLED = "the model was not called as a module in the step"


class LiveUnits:
    """Dropped units that leave the model at once: one of the two ways to apply masks while training.

    The model, the optimizer's state for it and its shape record shrink at every pruning step, so that training speeds
    up, and a checkpoint holds a slim model. It is the same training, since dropped units contribute nothing.

    Args:
        found: What discovery found in the model before anything is dropped.

    Attributes:
        found: The same.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = still there.
        gap: Why the last removal was not proven; None if it was, or needed no proof.
    """

    def __init__(self, found: Discovery) -> None:
        """See the class."""
        self.found = found
        self.masks = {s.name: torch.ones(s.units, dtype=torch.bool) for s in self.found.structures}
        self.gap: str | None = None
        self._current = {s.name: s for s in self.found.structures}
        self._shapes: dict[str, torch.Size] = {}
        self._proven: set[str] = set()  # output weights that took part in a proof
        self._zeros: MaskedUnits | None = None
        self._kept: dict[str, torch.Tensor] = {}  # the masks that are applied as zeros

    def fits(self, model: nn.Module) -> bool:
        """Whether a model has the shapes that these units left it with."""
        return all(get_tensor(model, name).shape == shape for name, shape in self._shapes.items())

    def current(self, structure: Structure) -> Structure:
        """A structure as it is in the model now."""
        return self._current[structure.name]

    def expand(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the units of a structure that are in the model, as scores of all that it had; on the CPU."""
        whole = torch.zeros(len(self.masks[name]), dtype=scores.dtype)
        whole[self.masks[name]] = scores.cpu()
        return whole

    def narrow(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """The reverse of `expand`."""
        return scores[self.masks[name].to(scores.device)]

    @property
    def has_removed(self) -> bool:
        """Whether any unit has left the model."""
        return any(not mask.all() for mask in self.masks.values())

    @property
    def keeps_zeros(self) -> bool:
        """Whether nothing leaves the model any more."""
        return self._zeros is not None

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """For each structure's name a boolean tensor of shape `[units]`, True = still there and not kept as zeros."""
        return {**self.masks, **self._kept}

    @property
    def unproven(self) -> set[str]:
        """The names of the structures that have lost units, and took part in no proof."""
        lost = {name for name, mask in self.masks.items() if not mask.all()}
        return {name for name in lost if not self._is_proven(self._current[name])}

    def find_shrinking(self, masks: Masks) -> list[Structure]:
        """The structures, as they are in the model now, that masks take units from.

        Args:
            masks: As for `apply`.

        Returns:
            Those structures.
        """
        return [self._current[name] for name, mask in masks.items() if (self.masks[name] & ~mask).any()]

    def apply(
        self,
        model: nn.Module,
        masks: Masks,
        optimizer: Any = None,
        calls: Sequence[Call] | None = None,
        *,
        is_last: bool = True,
    ) -> None:
        """Remove the units that masks drop.

        Args:
            model: The model; changed in place, its config too.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; units that are gone
                already must be dropped in it.
            optimizer: The optimizer, if there is one already; its state is sliced like the weights.
            calls: How the model was called on a batch, to prove the removal on it; None if there is nothing to prove,
                as the weights are yet to be loaded.
            is_last: Whether this is the last pruning step. Where a proof costs more than a training step, only the
                last one and those that take units from a structure for the first time are proven.

        Raises:
            RuntimeError: If the optimizer's state cannot be sliced; nothing has been changed then.
            VerificationError: If the model computes something else without the units; nothing has been changed then.
        """
        left = {name: mask[self.masks[name]] for name, mask in masks.items()}
        if self._zeros is not None:
            self._zeros.apply(model, left, optimizer)
            self._kept = {name: mask.clone() for name, mask in masks.items()}
            return
        shrinking = self.find_shrinking(masks)
        if not shrinking:
            return
        is_needed = is_last or not is_costly(model) or not all(map(self._is_proven, shrinking))
        if calls and is_needed:
            proof = compact_proven(model, shrinking, left, optimizer, calls)
        else:
            gap = _NOT_CALLED if calls is not None and is_needed else None
            proof = Proof(compact_model(model, shrinking, left, optimizer), frozenset(), gap)
        self._proven |= proof.reached
        self.gap = proof.gap
        for structure in proof.structures:
            self._current[structure.name] = structure
            self.masks[structure.name] = masks[structure.name].clone()
        self._record(model)

    def keep_zeros(self) -> None:
        """Let nothing leave the model any more: what is dropped from here on stays in it as zeros."""
        self._zeros = MaskedUnits(self._current.values(), WholeTensors())

    def take_up(self, masks: Masks, unproven: Iterable[str], *, keeps_zeros: bool) -> None:
        """Go on as a checkpoint says.

        Args:
            masks: The masks of the training.
            unproven: The names of the structures that have lost units without a proof.
            keeps_zeros: Whether what is dropped stays in the model as zeros.
        """
        for name in self.masks.keys() - set(unproven):
            if not self.masks[name].all():
                self._proven |= {member.tensor for member in self._current[name].outputs}
        if keeps_zeros:
            self.keep_zeros()
            self._kept = {name: mask.clone() for name, mask in masks.items()}

    def hold(self, model: nn.Module, optimizer: Any = None) -> None:
        """Keep zeros zero after an optimizer step, if there are any: what is gone cannot come back."""
        if self._zeros is not None:
            self._zeros.hold(model, optimizer)

    def restore(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Write zeros again that something else has written over, if there are any.

        Args:
            model: The model; changed in place.
            optimizer: The optimizer, if there is one.

        Returns:
            The names of the structures of which units had come back.
        """
        return self._zeros.restore(model, optimizer) if self._zeros is not None else []

    def take_shape(self, model: nn.Module, masks: Masks) -> None:
        """Give the model the shape that it had in a checkpoint whose weights are loaded next.

        Args:
            model: The model; changed in place.
            masks: As for `apply`. Units that are gone already may be kept in it: they come back without values.
        """
        self._zeros, self._kept = None, {}
        if any((mask & ~self.masks[name]).any() for name, mask in masks.items()):
            self._restore_shape(model)
        self.apply(model, masks)

    def shapes_before(self, model: nn.Module) -> dict[str, torch.Size]:
        """The shapes that tensors had before anything was removed.

        Args:
            model: The model, or a copy of it.

        Returns:
            For the names of the tensors that have become smaller the shapes.
        """
        shapes: dict[str, list[int]] = {}
        for dense in self.found.structures:
            for (name, dim), where in dense.positions(~self.masks[dense.name]).items():
                shapes.setdefault(name, list(get_tensor(model, name).shape))[dim] += len(where)
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    def _is_proven(self, structure: Structure) -> bool:
        return all(member.tensor in self._proven for member in structure.outputs)

    def _restore_shape(self, model: nn.Module) -> None:
        """Bring all units back, without values."""
        saved = model.state_dict().keys()
        for name, shape in self.shapes_before(model).items():
            if name not in saved:
                raise ValueError(
                    f"The checkpoint has more units than the model is left with, and {name} is not in it: build the "
                    "model anew, and resume with that."
                )
            get_tensor(model, name).grad = None
            change_tensor(model, name, partial(torch.Tensor.new_zeros, size=shape))
            set_sizes(get_module(model, name.rpartition(".")[0]))
        for dense in self.found.structures:
            for count in dense.counts:
                set_count(model, count, dense.units)
            self._current[dense.name] = dense
            self.masks[dense.name] = torch.ones(dense.units, dtype=torch.bool)
        self._record(model)

    def _record(self, model: nn.Module) -> None:
        """Write the shape into the model's configs, so that a checkpoint loads as what it is."""
        if model not in _LIVE:
            own_configs(model)
        _LIVE[model] = self
        names = {member.tensor for structure in self._current.values() for member in structure.members}
        self._shapes = {name: get_tensor(model, name).shape for name in names}
        _forget_compiled()
        for part in find_pretrained(model):
            refresh_record(part, is_own=True)


def find_live(model: nn.Module) -> LiveUnits | None:
    """Find the units of a model that has been made smaller while it trained.

    Args:
        model: Any model.

    Returns:
        Its units, None if it has not been, or has been changed otherwise since.
    """
    live = _LIVE.get(model)
    return live if live is not None and live.fits(model) else None


def find_live_obstacle(structures: Iterable[Structure]) -> str | None:
    """Say why the units of some structures cannot be removed in the middle of a training.

    Args:
        structures: The structures whose units would be removed.

    Returns:
        The reason, None if they can.
    """
    for structure in structures:
        for member in structure.members:
            if member.role == "norm":
                return (
                    f"{member.tensor} normalizes over all units of {structure.name}, so that removing some rescales "
                    "it, and an optimizer would go on differently"
                )
    return None


def find_state_obstacle(optimizer: Any, model: nn.Module, structures: Iterable[Structure]) -> str | None:
    """Say why an optimizer's state cannot be sliced like the parameters.

    Args:
        optimizer: The optimizer, after a step: before, most have no state.
        model: The model.
        structures: The structures, as they are in the model.

    Returns:
        The reason, None if it can.
    """
    places = dict.fromkeys((member.tensor, member.dim) for s in structures for member in s.members)
    return next(iter(find_state_slices(optimizer, model, places)[1].values()), None)


def _forget_compiled() -> None:
    """Let torch.compile begin anew: after a few shapes it would give up on a function and run it uncompiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
