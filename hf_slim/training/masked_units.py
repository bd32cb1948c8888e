"""Dropped units that stay in the model as zeros until it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..compaction import Place, Slices, Zeros, find_state_slices, find_zero_units, find_zeros, write_zeros, zero_state
from ..parallel import find_local, find_nonzero
from ..structures import Masks, Structure, get_tensor


class MaskedUnits:
    """Dropped units that stay in the model as zeros: one of the two ways to apply masks while training.

    The zeros are written when units are dropped, into the weights and into what the optimizer keeps for them. From
    then on the gradients of a dropped unit are zero, so that an optimizer that works element by element does not move
    it. That is seen to after the next optimizer step; what was moved, or has a gradient all the same (an activation
    that is not zero at zero) is written again after every step from then on. So is what something else wrote over.

    Args:
        structures: The structures whose units may be dropped.
        zero: DeepSpeed's ZeRO optimizer, if there is one; then everything is written again after every step.
    """

    def __init__(self, structures: Iterable[Structure], zero: Any = None) -> None:
        """See the class."""
        self._structures = {s.name: s for s in structures}
        self._zero = zero
        self._slices: Slices = {}
        self._restless: Zeros = []
        self._unseen: Zeros = []
        self._masks: Masks = {}
        self._zeros: dict[str, Zeros] = {}  # for each structure's name
        self._returned: set[Place] = set()  # what something else has written over

    def current(self, structure: Structure) -> Structure:
        """A structure as it is in the model now."""
        return structure

    def expand(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the units of a structure that are in the model, as scores of all that it had; on the CPU."""
        return scores.cpu()

    def narrow(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """The reverse of `expand`."""
        return scores

    @torch.no_grad()
    def apply(self, model: nn.Module, masks: Masks, optimizer: Any = None) -> None:
        """Zero the units that masks drop.

        Args:
            model: The model; changed in place.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
            optimizer: The optimizer, if there is one already.
        """
        self._masks = {name: mask.clone() for name, mask in masks.items()}
        structures = [self._structures[name] for name in masks]
        self._zeros = {s.name: find_zeros(model, [s], masks, self._zero) for s in structures}
        zeros = [z for found in self._zeros.values() for z in found]
        problems: Mapping[Place, str] = {}
        if self._zero is None:
            self._slices, problems = find_state_slices(optimizer, model, [(name, dim) for name, dim, _ in zeros])
        self._write(model, zeros, optimizer)
        moving = self._returned | problems.keys()
        self._restless = [z for z in zeros if self._zero is not None or z[:2] in moving]
        self._unseen = [z for z in zeros if self._zero is None and z[:2] not in moving]

    @torch.no_grad()
    def hold(self, model: nn.Module, optimizer: Any = None) -> None:
        """Keep the zeros zero, after an optimizer step and before its gradients are gone.

        Args:
            model: The model; changed in place.
            optimizer: The optimizer.
        """
        if self._unseen:
            self._restless = [*self._restless, *self._find_restless(model)]
            self._unseen = []
        self._write(model, self._restless, optimizer)

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Look at the zeros, and write them again where something else has written over them.

        Args:
            model: The model; changed in place. It may be a copy of the one that is trained.
            optimizer: The optimizer, if there is one.

        Returns:
            The names of the structures of which units had come back, as far as this process holds them.
        """
        if self._zero is not None:
            structures = [self._structures[name] for name in self._masks]
            used = find_zero_units(model, structures, whole=True, zero=self._zero)
            names = [name for name, mask in self._masks.items() if (used[name] & ~mask).any()]
            self._write(model, [z for name in names for z in self._zeros[name]], optimizer)
            return names
        places = [(name, z) for name, zeros in self._zeros.items() for z in zeros]
        flags = [find_local(get_tensor(model, z[0])).index_select(z[1], z[2]).any() for _, z in places]
        if not flags:
            return []
        told = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # the device is waited for once
        returned = [place for place, is_back in zip(places, told, strict=True) if is_back]
        self._write(model, [z for _, z in returned], optimizer)
        self._returned |= {z[:2] for _, z in returned}
        self._restless = [*self._restless, *(z for z in self._unseen if z[:2] in self._returned)]
        self._unseen = [z for z in self._unseen if z[:2] not in self._returned]
        known = {z[:2] for z in (*self._restless, *self._unseen)}
        self._restless = [*self._restless, *(z for _, z in returned if z[:2] not in known)]
        return list(dict.fromkeys(name for name, _ in returned))

    def _find_restless(self, model: nn.Module) -> list[tuple[str, int, torch.Tensor]]:
        """Which zeros an optimizer step has moved or may move: those with a gradient, or without any to judge by."""
        flags = []
        for name, dim, where in self._unseen:
            tensor = get_tensor(model, name)
            flag = find_nonzero(dim, find_local(tensor))[where].any()
            if tensor.requires_grad and tensor.grad is None:
                flag = torch.ones_like(flag)
            elif tensor.requires_grad:
                gradient = find_nonzero(dim, find_local(tensor.grad))  # type: ignore[arg-type]
                flag = flag | gradient[where].any() | gradient.any().logical_not()
            flags.append(flag)
        told = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # the device is waited for once
        return [zeros for zeros, is_restless in zip(self._unseen, told, strict=True) if is_restless]

    def _write(self, model: nn.Module, zeros: Zeros, optimizer: Any) -> None:
        write_zeros(model, zeros, self._zero)
        for name, dim, where in zeros if self._zero is None and optimizer is not None else ():
            zero_state(optimizer, get_tensor(model, name), self._slices[name, dim], where)
