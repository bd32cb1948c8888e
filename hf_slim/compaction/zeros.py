"""Zero the units that a mask drops, and find the units that are zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..parallel import (
    change_tensor,
    find_begin,
    find_local,
    find_nonzero,
    is_offloaded,
    read_tensor,
    sum_over_shards,
    sum_places,
    write_zeros_everywhere,
)
from ..structures import Masks, Structure, get_tensor

Zeros = Sequence[tuple[str, int, torch.Tensor]]
"""Tensor names, dimensions and positions to be written with zeros."""


def zero_units(model: nn.Module, structures: Iterable[Structure], masks: Masks) -> None:
    """Write zeros into every tensor of the units that the masks drop.

    Args:
        model: The model that the structures were found in; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
    """
    structures = list(structures)
    write_zeros(model, find_zeros(model, structures, masks))
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            if len(where) and is_offloaded(model, name):
                change_tensor(model, name, partial(_with_zeros, dim=dim, where=where))


def find_zeros(model: nn.Module, structures: Iterable[Structure], masks: Masks, zero: Any = None) -> Zeros:
    """Work out where `write_zeros` is to write, once for many optimizer steps.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        zero: DeepSpeed's ZeRO optimizer, if there is one.

    Returns:
        For each tensor and dimension the positions in this process's part of it, on the tensor's device; with ZeRO
        those in the whole tensor.
    """
    zeros = []
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            if zero is not None:
                zeros.append((name, dim, where))
                continue
            tensor = get_tensor(model, name)
            local = find_local(tensor)
            where = where - find_begin(tensor)[dim]
            where = where[(where >= 0) & (where < local.shape[dim])]
            if len(where):
                zeros.append((name, dim, where.to(local.device)))
    return zeros


@torch.no_grad()
def write_zeros(model: nn.Module, zeros: Zeros, zero: Any = None) -> None:
    """Write the zeros that `find_zeros` worked out.

    Args:
        model: The model; changed in place.
        zeros: Where.
        zero: DeepSpeed's ZeRO optimizer, if there is one; its own copy of the weights gets the zeros, too.
    """
    for name, dim, where in zeros:
        tensor = get_tensor(model, name)
        if zero is not None:
            write_zeros_everywhere(tensor, dim, where)
        else:
            find_local(tensor).index_fill_(dim, where, 0)


def find_zero_units(
    model: nn.Module, structures: Iterable[Structure], *, whole: bool = False, zero: Any = None
) -> dict[str, torch.Tensor]:
    """Find the units that contribute nothing to the output.

    Such a unit has zeros in its FFN2 or output-projection columns; where an RMS norm spans all units, also in what
    makes it, since the norm reads it.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        whole: Ask for zeros in every tensor of the unit.
        zero: DeepSpeed's ZeRO optimizer, if there is one.

    Returns:
        Masks on the CPU: for each structure's name a boolean tensor of shape `[units]`, False for the units that are
        zero.
    """
    asked = {s.name: s.members if whole else s.deciders for s in structures}
    places = dict.fromkeys((m.tensor, m.dim) for members in asked.values() for m in members)
    if zero is None:
        counts = sum_over_shards(
            model, {place: _count_others(read_tensor(model, place[0]), place[1]) for place in places}
        )
    else:
        counts = sum_places(zero, model, places, lambda weight: (weight != 0).float(), gradient=False)
    used = {place: (count > 0).cpu() for place, count in counts.items()}
    return {
        name: torch.stack([used[m.tensor, m.dim][m.index].any(1) for m in members]).any(0)
        for name, members in asked.items()
    }


def _with_zeros(tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(dim, where.to(tensor.device), 0)


def _count_others(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """For each position along a dimension 1 if anything there is not zero, else 0; of this process's part."""
    return find_nonzero(dim, find_local(tensor)).float()
