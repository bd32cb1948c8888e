"""Zero the units that a mask drops, and find the units that are zero."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from ..parallel import Shards, Zeros, change_tensor, find_shards, is_offloaded
from ..structures import Masks, Structure, get_tensor


def zero_units(model: nn.Module, structures: Iterable[Structure], masks: Masks) -> None:
    """Write zeros into every tensor of the units that the masks drop.

    Args:
        model: The model that the structures were found in; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
    """
    structures, shards = list(structures), find_shards(model)
    for name, dim, where in find_zeros(model, structures, masks, shards):
        shards.write_zeros(get_tensor(model, name), dim, where)
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            if len(where) and is_offloaded(model, name):
                change_tensor(model, name, partial(_with_zeros, dim=dim, where=where))


def find_zeros(model: nn.Module, structures: Iterable[Structure], masks: Masks, shards: Shards) -> Zeros:
    """Work out where this process is to write zeros, once for many optimizer steps.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        shards: Where the model's weights are.

    Returns:
        For each tensor and dimension the positions that `Shards.write_zeros` takes.
    """
    zeros = []
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            own = shards.find_own(get_tensor(model, name), dim, where)
            if len(own):
                zeros.append((name, dim, own))
    return zeros


def find_zero_units(
    model: nn.Module, structures: Iterable[Structure], shards: Shards | None = None, *, whole: bool = False
) -> dict[str, torch.Tensor]:
    """Find the units that contribute nothing to the output.

    Such a unit has zeros in its FFN2 or output-projection columns; where an RMS norm spans all units, also in what
    makes it, since the norm reads it.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        shards: Where a training has the model's weights, while there is one.
        whole: Ask for zeros in every tensor of the unit.

    Returns:
        Masks on the CPU: for each structure's name a boolean tensor of shape `[units]`, False for the units that are
        zero.
    """
    asked = {s.name: s.members if whole else s.deciders for s in structures}
    places = dict.fromkeys((m.tensor, m.dim) for members in asked.values() for m in members)
    used = (shards or find_shards(model)).find_nonzero(model, places)
    return {
        name: torch.stack([used[m.tensor, m.dim][m.index].any(1) for m in members]).any(0)
        for name, members in asked.items()
    }


def _with_zeros(tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(dim, where.to(tensor.device), 0)
