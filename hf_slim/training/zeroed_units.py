"""Dropped units that stay in the model as zeros until it is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..compaction import Slices, find_state_slices, find_zeros, zero_state
from ..parallel import Place, Shards, Zeros
from ..structures import Masks, Structure, get_tensor
from .dropped_units import DroppedUnits, Step
from .model_shape import ModelShape


class ZeroedUnits:
    """Dropped units that stay in the model as zeros: one of the ways to apply masks while training.

    The zeros are written when units are dropped, into the weights and into what the optimizer keeps for them. From
    then on the gradients of a dropped unit are zero, so that an optimizer that works element by element does not move
    it. That is seen to after the next optimizer step; what was moved, or has a gradient all the same (an activation
    that is not zero at zero) is written again after every step from then on. So is what something else wrote over.

    Args:
        shape: Which units the model has.
        shards: Where the model's weights are.
    """

    removes = False
    is_settled = True

    def __init__(self, shape: ModelShape, shards: Shards) -> None:
        """See the class."""
        self.shape = shape
        self._shards = shards
        self._slices: Slices = {}
        self._restless: set[Place] = set()  # what is written after every step
        self._is_seen = False  # whether a step has shown what else is
        self._zeros: dict[str, Zeros] = {}  # for each structure's name
        self._returned: set[Place] = set()  # what something else has written over

    def settle(self, model: nn.Module, optimizer: Any, structures: Sequence[Structure]) -> DroppedUnits:
        """Choose how masks are applied from here on; as zeros, too."""
        return self

    @torch.no_grad()
    def apply(self, model: nn.Module, masks: Masks, optimizer: Any, step: Step) -> DroppedUnits:
        """Write the zeros; see `DroppedUnits`."""
        left = self.shape.narrow_masks(masks)
        structures = map(self.shape.find_current, left)
        self._zeros = {s.name: find_zeros(model, [s], left, self._shards) for s in structures}
        zeros = [z for found in self._zeros.values() for z in found]
        self._slices, problems = find_state_slices(optimizer, model, [(name, dim) for name, dim, _ in zeros])
        self._write(model, zeros, optimizer)
        self._restless, self._is_seen = self._returned | problems.keys(), False
        return self

    @torch.no_grad()
    def hold(self, model: nn.Module, optimizer: Any = None) -> None:
        """Write what moves again; see `DroppedUnits`."""
        if self._is_seen and not self._restless:
            return
        zeros = [z for found in self._zeros.values() for z in found]
        if not self._is_seen:
            unseen = [z for z in zeros if z[:2] not in self._restless]
            told = self._shards.find_restless(model, unseen)
            self._restless |= {z[:2] for z, is_restless in zip(unseen, told, strict=True) if is_restless}
            self._is_seen = True
        self._write(model, [z for z in zeros if z[:2] in self._restless], optimizer)

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Write what is not zero any more; see `DroppedUnits`."""
        places = [(name, z) for name, zeros in self._zeros.items() for z in zeros]
        told = self._shards.find_returned(model, [z for _, z in places])
        returned = [place for place, is_back in zip(places, told, strict=True) if is_back]
        self._write(model, [z for _, z in returned], optimizer)
        self._returned |= {z[:2] for _, z in returned}
        self._restless |= self._returned
        return list(dict.fromkeys(name for name, _ in returned))

    def _write(self, model: nn.Module, zeros: Zeros, optimizer: Any) -> None:
        for name, dim, where in zeros:
            tensor = get_tensor(model, name)
            self._shards.write_zeros(tensor, dim, where)
            if optimizer is not None:
                zero_state(optimizer, tensor, self._slices[name, dim], where, self._shards)
