"""From masks to smaller tensors and attributes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from .attributes import set_count
from .layers import sizes_of
from .offloading import change_tensor
from .selection import round_up
from .structures import Masks, Structure, get_module, get_tensor
from .widths import infer_widths


def compact_model(model: nn.Module, structures: Sequence[Structure], masks: Masks) -> None:
    """Remove the units that the masks drop: slice the tensors and change the attributes that count units.

    The Parameter objects stay the same, with smaller data; their gradients are dropped. Dropping units that are not
    zero changes what the model computes.

    Args:
        model: The model that the structures were found in; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

    Raises:
        ValueError: If a mask keeps no unit at all.
    """
    dropped: dict[tuple[str, int], list[torch.Tensor]] = {}
    for structure in structures:
        if not masks[structure.name].any():
            raise ValueError(
                f"{structure.name}: the mask keeps none of the {structure.units} units; keep one at least."
            )
        for place, where in structure.positions(~masks[structure.name]).items():
            dropped.setdefault(place, []).append(where)
    for (name, dim), parts in dropped.items():
        where = torch.cat(parts)
        if len(where):
            _remove_positions(model, name, dim, where)
    for structure in structures:
        _follow(model, structure, int(masks[structure.name].sum()))


def resize_structures(model: nn.Module, structures: Sequence[Structure], units: Mapping[str, int]) -> None:
    """Give structures a number of units, for weights that will be loaded into them afterwards.

    Args:
        model: A model whose structures have at least as many units; changed in place.
        structures: Its structures.
        units: For each structure's name the number of units.

    Raises:
        ValueError: If a structure has fewer units than asked for, or none are asked for.
    """
    for structure in structures:
        wanted = units[structure.name]
        if not 1 <= wanted <= structure.units:
            raise ValueError(f"{structure.name} has {structure.units} units, so it cannot be given {wanted}.")
    places = [(m.tensor, m.dim) for s in structures for m in s.members]
    if len(set(places)) < len(places) or not all(get_tensor(model, name).is_meta for name, _ in places):
        masks = {s.name: torch.arange(s.units, device="cpu") < units[s.name] for s in structures}
        return compact_model(model, structures, masks)
    # Where there are no values, and each place has one member, the sizes are all there is to know.
    for structure in structures:
        wanted = units[structure.name]
        for member in structure.members:
            tensor = get_tensor(model, member.tensor)
            shape = list(tensor.shape)
            shape[member.dim] -= (structure.units - wanted) * member.index.shape[1]
            tensor.data = tensor.data.new_empty(shape)
            _set_sizes(model, member.tensor)
        _follow(model, structure, wanted)


def round_masks(structures: Sequence[Structure], masks: Masks, multiple: int) -> dict[str, torch.Tensor]:
    """Keep some dropped units after all, so that the numbers of channels are multiples and no structure is empty.

    Args:
        structures: The structures of the masks.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        multiple: Multiple for the number of intermediate channels; heads are not rounded. That of stacked experts is
            a multiple of their own as well.

    Returns:
        New masks, that keep the first of the dropped units in addition.
    """
    rounded = {}
    for structure in structures:
        mask = masks[structure.name].clone()
        number = max(1, int(mask.sum()))
        if structure.kind == "ffn":
            number = round_up(number, math.lcm(multiple, structure.multiple), structure.units)
        spare = (~mask).nonzero().flatten()
        mask[spare[: number - int(mask.sum())]] = True
        rounded[structure.name] = mask
    return rounded


def _follow(model: nn.Module, structure: Structure, kept: int) -> None:
    """Change what depends on the number of units besides the sizes of the tensors."""
    for count in structure.counts:
        set_count(model, count, kept)
    for name in structure.reshaping if kept < structure.units else ():
        infer_widths(get_module(model, name))
    for member in structure.members:
        if member.role == "norm":
            change_tensor(model, member.tensor, partial(torch.mul, other=(structure.units / kept) ** 0.5))


@torch.no_grad()
def _remove_positions(model: nn.Module, name: str, dim: int, where: torch.Tensor) -> None:
    """Slice one tensor; the larger one is freed before the next is read."""
    get_tensor(model, name).grad = None
    change_tensor(model, name, lambda tensor: _without(tensor, dim, where))
    _set_sizes(model, name)


def _set_sizes(model: nn.Module, name: str) -> None:
    """Let the layer of a tensor state its sizes."""
    module = get_module(model, name.rpartition(".")[0])
    for attribute, value in sizes_of(module).items():
        setattr(module, attribute, value)


def _without(tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
    """A tensor without some positions along a dimension, contiguous and with memory of its own."""
    size = tensor.shape[dim]
    keep = torch.ones(size, dtype=torch.bool, device="cpu")
    keep[where] = False
    # Heads keep ranges: whole blocks are copied, of the largest size that all ranges are multiples of.
    block = math.gcd(size, *((keep[1:] != keep[:-1]).nonzero().flatten() + 1).tolist())
    index = keep[::block].nonzero().flatten().to(tensor.device)
    blocks = tensor.unflatten(dim, (-1, block))
    if blocks.shape[dim + 1 :].numel() > 1 or dim == 0:
        return blocks.index_select(dim, index).flatten(dim, dim + 1).contiguous()
    # Single values, for which `index_select` is slow.
    left = (*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :])
    bits = tensor.view(_BITS[tensor.element_size()])
    return bits.gather(dim, index.view(-1, *(1,) * (tensor.dim() - dim - 1)).expand(left)).view(tensor.dtype)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of as many bytes, whose values are moved faster than those of floating-point types."""
