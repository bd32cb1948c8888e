"""From masks to smaller tensors and attributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..modeling_hf_slim import infer_widths, mark_tensor, set_sizes
from ..parallel import Place, change_tensor, take_positions
from ..structures import Masks, Structure, get_module, get_tensor, set_count
from .optimizer_state import find_state_slices, keep_state


def compact_model(
    model: nn.Module, structures: Sequence[Structure], masks: Masks, optimizer: Any = None
) -> list[Structure]:
    """Remove the units that the masks drop: slice the tensors and change the attributes that count units.

    The Parameter objects stay the same, with smaller data, and so in the optimizer's parameter groups; their gradients
    are dropped. Dropping units that are not zero changes what the model computes.

    Args:
        model: The model that the structures were found in; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        optimizer: The optimizer in the middle of a training, if there is one; its state is sliced as well.

    Returns:
        The structures as they are now, in the same order.

    Raises:
        ValueError: If a mask keeps no unit at all.
        RuntimeError: If the optimizer's state cannot be sliced; nothing has been changed then.
    """
    for structure in structures:
        if not masks[structure.name].any():
            raise ValueError(
                f"{structure.name}: the mask keeps none of the {structure.units} units; keep one at least."
            )
    kept = find_kept(model, structures, masks)
    slices, problems = find_state_slices(optimizer, model, kept)
    for problem in problems.values():
        raise RuntimeError(f"The units cannot be removed in the middle of a training: {problem}.")
    numbers = {}
    for place, keep in kept.items():
        numbers[place] = keep.cumsum(0) - 1
        _keep_positions(model, *place, keep)
        keep_state(optimizer, get_tensor(model, place[0]), slices[place], keep)
    for structure in structures:
        _follow(model, structure, int(masks[structure.name].sum()))
    return [structure.keep(masks[structure.name], numbers) for structure in structures]


def grow_tensors(model: nn.Module, sizes: Mapping[str, torch.Size], structures: Iterable[Structure]) -> None:
    """Bring all units back that have left a model, without values.

    Args:
        model: The model; changed in place.
        sizes: The sizes that tensors had, of those that are smaller now.
        structures: Its structures as they were before anything was removed.
    """
    for name, size in sizes.items():
        get_tensor(model, name).grad = None
        change_tensor(model, name, partial(torch.Tensor.new_zeros, size=size))
        set_sizes(get_module(model, name.rpartition(".")[0]))
    for structure in structures:
        for count in structure.counts:
            set_count(model, count, structure.units)


def find_kept(model: nn.Module, structures: Sequence[Structure], masks: Masks) -> dict[Place, torch.Tensor]:
    """Find what stays of the tensors that become smaller.

    Args:
        model: The model that the structures were found in.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

    Returns:
        For each tensor and dimension a boolean tensor of shape `[size of the dimension]` on the CPU, True = stays.
    """
    kept: dict[Place, torch.Tensor] = {}
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            if len(where):
                size = get_tensor(model, name).shape[dim]
                kept.setdefault((name, dim), torch.ones(size, dtype=torch.bool, device="cpu"))[where] = False
    return kept


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


def round_up(number: int, multiple: int, units: int) -> int:
    """The next multiple, but no more than there are.

    Args:
        number: Units that are needed.
        multiple: The multiple.
        units: Units that there are.

    Returns:
        Number of units.
    """
    return min(units, math.ceil(number / multiple) * multiple)


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
def _keep_positions(model: nn.Module, name: str, dim: int, keep: torch.Tensor) -> None:
    """Slice one tensor; the larger one is freed before the next is read."""
    path, _, leaf = name.rpartition(".")
    module = get_module(model, path)
    mark_tensor(module, leaf)
    get_tensor(model, name).grad = None
    change_tensor(model, name, lambda tensor: take_positions(tensor, dim, keep))
    set_sizes(module)
