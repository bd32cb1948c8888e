"""Zero the units that a mask drops, and find the units that are zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .structures import Masks, Member, Structure, get_tensor

Zeros = Sequence[tuple[str, int, torch.Tensor]]
"""Tensor names, dimensions and positions to be written with zeros."""


def zero_units(model: nn.Module, structures: Iterable[Structure], masks: Masks) -> None:
    """Write zeros into every tensor of the units that the masks drop.

    Args:
        model: The model that the structures were found in; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
    """
    write_zeros(model, find_zeros(model, structures, masks))


def find_zeros(model: nn.Module, structures: Iterable[Structure], masks: Masks) -> Zeros:
    """Work out where `write_zeros` is to write, once for many optimizer steps.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

    Returns:
        For each tensor and dimension the positions, on the tensor's device.
    """
    return [
        (name, dim, where.to(get_tensor(model, name).device))
        for structure in structures
        for (name, dim), where in structure.positions(~masks[structure.name]).items()
        if len(where)
    ]


@torch.no_grad()
def write_zeros(model: nn.Module, zeros: Zeros) -> None:
    """Write the zeros that `find_zeros` worked out.

    Args:
        model: The model; changed in place.
        zeros: Where.
    """
    for name, dim, where in zeros:
        get_tensor(model, name).index_fill_(dim, where, 0)


def find_zero_units(
    model: nn.Module, structures: Iterable[Structure], *, whole: bool = False
) -> dict[str, torch.Tensor]:
    """Find the units that contribute nothing to the output.

    Such a unit has zeros in its FFN2 or output-projection columns; where an RMS norm spans all units, also in what
    makes it, since the norm reads it.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        whole: Ask for zeros in every tensor of the unit.

    Returns:
        Masks on the CPU: for each structure's name a boolean tensor of shape `[units]`, False for the units that are
        zero.
    """
    return {
        s.name: torch.stack([_is_used(model, m) for m in (s.members if whole else s.deciders)]).any(0)
        for s in structures
    }


@torch.no_grad()
def _is_used(model: nn.Module, member: Member) -> torch.Tensor:
    tensor = get_tensor(model, member.tensor)
    others = [d for d in range(tensor.dim()) if d != member.dim]
    used = (tensor != 0).any(dim=others) if others else tensor != 0
    return used.cpu()[member.index].any(1)
