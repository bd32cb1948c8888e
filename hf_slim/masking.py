"""Zero the units that a mask drops, and find the units that are zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .offloading import change_tensor, is_offloaded, read_tensor
from .sharding import find_begin, find_local, sum_over_shards
from .structures import Masks, Structure, get_tensor
from .zero import sum_places
from .zero import write_zeros as write_zeros_everywhere

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
def write_zeros(model: nn.Module, zeros: Zeros, optimizer: Any = None, zero: Any = None) -> None:
    """Write the zeros that `find_zeros` worked out.

    Args:
        model: The model; changed in place.
        zeros: Where.
        optimizer: The optimizer, if any. One that keeps weights of its own and puts them into the model for evaluation
            (schedule-free: Defazio et al. 2024, arXiv:2405.15682) gets the zeros there, too.
        zero: DeepSpeed's ZeRO optimizer, if there is one; its own copy of the weights gets the zeros, too.
    """
    if zero is not None:
        for name, dim, where in zeros:
            write_zeros_everywhere(get_tensor(model, name), dim, where)
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    state = inner.state if callable(getattr(inner, "eval", None)) else {}
    for name, dim, where in zeros:
        tensor = get_tensor(model, name)
        for kept in (tensor, *state.get(tensor, {}).values()):
            if isinstance(kept, torch.Tensor) and kept.shape == tensor.shape:
                find_local(kept).index_fill_(dim, where, 0)


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
    local = find_local(tensor)
    others = [d for d in range(local.dim()) if d != dim]
    if not others:
        return (local != 0).float()
    if not local.numel() or local.element_size() == 1:  # of those types no maxima can be had
        return (local != 0).any(dim=others).float()
    # Exact, NaN and the smallest numbers included, and without a temporary of the size of the weight.
    return ((local.amax(others) != 0) | (local.amin(others) != 0)).float()
