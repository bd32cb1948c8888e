"""Which units a model still has that is made smaller while it trains."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..compaction import compact_model, find_pretrained, grow_tensors, own_configs, refresh_record
from ..parallel import read_tensor, whole_shape
from ..structures import Masks, Structure, find_structures, get_tensor
from .loaded_weights import count_units

_KEPT_AS = "_hf_slim_shape"
"""Attribute of a model with what it has lost while it trained, or for a checkpoint of such a training."""


class ModelShape:
    """Which units a model still has, of those that it had before a training made it smaller.

    It is kept with the model as soon as anything has left it. A copy of the model, or one that is read from a file,
    has none: such a model is what it is.

    Args:
        model: The model, before anything is dropped.

    Attributes:
        found: What discovery found in it.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = still there.
        is_recorded: Whether the model's configs are its own and record the shape, in the training that goes on.
        is_unnamed: Whether its sizes are those of weights that were loaded, and it is not known yet which units left.
        proven: The output weights that took part in a proof that the model computes the same without the units.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        self.found = found = find_structures(model)
        self.masks = {s.name: torch.ones(s.units, dtype=torch.bool) for s in found.structures}
        self.is_recorded = False
        self.is_unnamed = False
        self.proven: set[str] = set()
        self._current = {s.name: s for s in found.structures}
        self._note_tensors(model)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing is left of it in a copy or a pickle of the model."""
        return type(None), ()

    def fits(self, model: nn.Module, *, is_same: bool = False) -> bool:
        """Whether a model has the tensors of the structures, in the sizes that it was left with.

        Args:
            model: The model, or a copy of it, whatever has been done to it since.
            is_same: Ask for the very parameters, so that layers have not changed places.

        Returns:
            Whether what is known of its units holds.
        """
        found = dict(_find_tensors(model))
        return all(
            name in found
            and whole_shape(found[name]) == size
            and (not is_same or parameter is None or parameter() is found[name])
            for name, (size, parameter) in self._tensors.items()
        )

    @property
    def has_removed(self) -> bool:
        """Whether any unit has left the model."""
        return any(not mask.all() for mask in self.masks.values())

    @property
    def unproven(self) -> set[str]:
        """The names of the structures that have lost units, and took part in no proof."""
        lost = {name for name, mask in self.masks.items() if not mask.all()}
        return {name for name in lost if not self.is_proven(self._current[name])}

    def is_proven(self, structure: Structure) -> bool:
        """Whether all that reads a structure's units took part in a proof."""
        return all(member.tensor in self.proven for member in structure.outputs)

    def prove_all_but(self, unproven: Iterable[str]) -> None:
        """Take all that has left the model as proven, but for what left some structures; so says a checkpoint."""
        for name in self.masks.keys() - set(unproven):
            if not self.masks[name].all():
                self.proven |= {member.tensor for member in self._current[name].outputs}

    def find_current(self, name: str) -> Structure:
        """The structure of that name as it is in the model now."""
        return self._current[name]

    def expand(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values of the units of a structure that are in the model, as values of all that it had; on the CPU."""
        whole = torch.zeros(len(self.masks[name]), dtype=values.dtype)
        whole[self.masks[name]] = values.cpu()
        return whole

    def narrow(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The reverse of `expand`."""
        return values[self.masks[name].to(values.device)]

    def narrow_masks(self, masks: Masks) -> dict[str, torch.Tensor]:
        """Masks of the units that structures had, as masks of those that are in the model."""
        return {name: self.narrow(name, mask) for name, mask in masks.items()}

    def find_shrinking(self, masks: Masks) -> list[Structure]:
        """The structures, as they are in the model now, that masks take units from."""
        return [self._current[name] for name, mask in masks.items() if (self.masks[name] & ~mask).any()]

    def follow(self, model: nn.Module, structures: Iterable[Structure], masks: Masks) -> None:
        """Take note of units that have left the model, with it and in its configs, so that checkpoints load.

        Args:
            model: The model.
            structures: The structures that have lost units, as they are now.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        """
        for structure in structures:
            self._current[structure.name] = structure
            self.masks[structure.name] = masks[structure.name].clone()
        self._record(model)

    def take(self, model: nn.Module, masks: Masks) -> None:
        """Give the model the shape that it had in a checkpoint whose weights are loaded next.

        Args:
            model: The model; changed in place.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep. Units that are gone
                already may be kept in it: they come back without values.

        Raises:
            ValueError: If a tensor would have to grow that no checkpoint holds.
        """
        if any((mask & ~self.masks[name]).any() for name, mask in masks.items()):
            self._restore(model)
        shrinking = self.find_shrinking(masks)
        if shrinking:
            self.follow(model, compact_model(model, shrinking, self.narrow_masks(masks)), masks)

    def take_sizes(self, model: nn.Module, weights: Mapping[str, Any], prefix: str) -> None:
        """Give the model the sizes of weights that are loaded next; `name_units` has to follow.

        Args:
            model: The model; changed in place.
            weights: The weights.
            prefix: What stands before the model's names in theirs.

        Raises:
            RuntimeError: If a tensor would change that is not among the weights.
        """
        counts = count_units(model, self.found.structures, self.sizes_before(model), weights, prefix)
        masks = {}
        for name, mask in self.masks.items():
            count = counts[name]
            masks[name] = mask
            if count is not None and count != int(mask.sum()):
                masks[name] = torch.arange(len(mask)) < count
        changed = [name for name, mask in masks.items() if not mask.equal(self.masks[name])]
        if not changed:
            return
        given = {id(tensor) for name, tensor in _find_tensors(model) if prefix + name in weights}
        for member in (m for name in changed for m in self._current[name].members):
            if id(get_tensor(model, member.tensor)) not in given:
                raise RuntimeError(
                    f"The weights are of a model from which other units have left, and {member.tensor} is not among "
                    "them: call load_state_dict of the Slimmer before that of the model."
                )
        self.take(model, masks)
        self.is_unnamed = True

    def refuse_unnamed(self) -> None:
        """Refuse to go on with weights of other sizes as long as nobody has said which units have left.

        Raises:
            RuntimeError: If that is so.
        """
        if self.is_unnamed:
            raise RuntimeError(
                "The weights that were loaded are of a model from which other units have left: load the Slimmer's "
                "state of the same checkpoint, too (load_state_dict, or register it with "
                "Accelerator.register_for_checkpointing)."
            )

    def refuse_changed(self) -> None:
        """Refuse to go on with a model that something else has made smaller; it costs next to nothing.

        Raises:
            RuntimeError: If that is so.
        """
        for name, (size, kept) in self._tensors.items():
            parameter = kept() if kept is not None else None
            if parameter is not None and parameter.shape != size:
                raise RuntimeError(
                    f"{name} has the shape {tuple(parameter.shape)}, and had {tuple(size)} in this training: "
                    "something else has removed units (model_slim, slim), of which the Slimmer and the optimizer know "
                    "nothing. Build the model anew, or call detach() of the Slimmer and train on with a new optimizer."
                )

    def name_units(self, model: nn.Module, masks: Masks) -> None:
        """Say which units have left a model that has the weights of a checkpoint already, in their sizes.

        Args:
            model: The model; changed in place, but for the weights.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

        Raises:
            ValueError: If the weights have other sizes.
        """
        weights = {name: read_tensor(model, name).detach().clone() for name in self.sizes_before(model)}
        self.is_unnamed = False
        self.take(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
        self.take(model, masks)
        if {name: whole_shape(get_tensor(model, name)) for name in self.sizes_before(model)} != {
            name: weight.shape for name, weight in weights.items()
        }:
            raise ValueError("The weights that were loaded and the Slimmer's state are not of the same checkpoint.")
        for name, weight in weights.items():
            get_tensor(model, name).detach().copy_(weight)

    def sizes_before(self, model: nn.Module) -> dict[str, torch.Size]:
        """The sizes that tensors had before anything was removed.

        Args:
            model: The model, or a copy of it.

        Returns:
            For the names of the tensors that have become smaller the sizes.
        """
        sizes: dict[str, list[int]] = {}
        for dense in self.found.structures:
            for (name, dim), where in dense.positions(~self.masks[dense.name]).items():
                sizes.setdefault(name, list(get_tensor(model, name).shape))[dim] += len(where)
        return {name: torch.Size(size) for name, size in sizes.items()}

    def _restore(self, model: nn.Module) -> None:
        """Bring all units back, without values."""
        saved = model.state_dict().keys()
        sizes = self.sizes_before(model)
        if missing := [name for name in sizes if name not in saved]:
            raise ValueError(
                f"The checkpoint has more units than the model is left with, and {missing[0]} is not in it: build the "
                "model anew, and resume with that."
            )
        grow_tensors(model, sizes, self.found.structures)
        self.proven.clear()
        whole = {s.name: torch.ones(s.units, dtype=torch.bool) for s in self.found.structures}
        self.follow(model, self.found.structures, whole)

    def _note_tensors(self, model: nn.Module) -> None:
        """Note sizes, and which parameters they are of where processes do not hold parts of them."""
        self._tensors: dict[str, tuple[torch.Size, weakref.ref[torch.Tensor] | None]] = {}
        for member in (m for structure in self._current.values() for m in structure.members):
            tensor = get_tensor(model, member.tensor)
            is_whole = type(tensor) is nn.Parameter and tensor.shape == whole_shape(tensor)
            self._tensors[member.tensor] = whole_shape(tensor), weakref.ref(tensor) if is_whole else None

    def _record(self, model: nn.Module) -> None:
        if not self.is_recorded:  # other models may have been built from the configs since
            own_configs(model)
        self.is_recorded = True
        vars(model)[_KEPT_AS] = self
        self._note_tensors(model)
        if "torch._dynamo" in sys.modules:  # after a few shapes torch.compile would run a function uncompiled
            torch.compiler.reset()
        for part in find_pretrained(model):
            refresh_record(part, is_own=True)


def find_shape(model: nn.Module) -> ModelShape | None:
    """Find what a model has lost while it trained.

    Args:
        model: Any model.

    Returns:
        Its shape, None if it has lost nothing, or has been changed otherwise since.
    """
    shape = vars(model).get(_KEPT_AS)
    return shape if isinstance(shape, ModelShape) and shape.fits(model) else None


def _find_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
