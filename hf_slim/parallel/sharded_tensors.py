"""Tensors of which every process holds a part (FSDP2): the part that is here, and sums over all parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..structures import get_tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each process holds only a part of a tensor.

    Args:
        tensor: Any tensor.

    Returns:
        True for a DTensor.
    """
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def find_local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds.

    Args:
        tensor: A tensor, sharded or not.

    Returns:
        The part, sharing its memory with the tensor.
    """
    with torch.no_grad():
        sharded: Any = tensor
        return (sharded.to_local() if is_sharded(tensor) else tensor).detach()


def find_begin(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where the part of a tensor that this process holds begins.

    Args:
        tensor: A tensor, sharded or not.

    Returns:
        The position in each dimension.
    """
    if not is_sharded(tensor):
        return (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    return tuple(compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)[1])


def sum_over_shards(model: nn.Module, parts: Mapping[tuple[str, int], torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Put together what each process computed for the positions along a dimension of its part of a tensor.

    Args:
        model: The model.
        parts: For dotted names of tensors and their dimensions a floating-point number for each position that this
            process holds; the same keys in the same order in every process.

    Returns:
        For the same keys the sums over all processes, shape `[positions]`; all processes together send one message.
    """
    sums = {}
    groups: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for (name, dim), part in parts.items():
        tensor: Any = get_tensor(model, name)
        sums[name, dim] = part
        if is_sharded(tensor):
            begin = find_begin(tensor)[dim]
            sums[name, dim] = part.new_zeros(tensor.shape[dim])
            sums[name, dim][begin : begin + len(part)] = part
            groups.setdefault(_shard_groups(tensor), []).append((name, dim))
    for members, keys in groups.items():
        together = torch.cat([sums[key] for key in keys])
        for group in members:
            dist.all_reduce(together, group=group)
        sums.update(zip(keys, together.split([len(sums[key]) for key in keys]), strict=True))
    return sums


def _shard_groups(tensor: Any) -> tuple[Any, ...]:
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(number) for number, place in enumerate(tensor.placements) if place.is_shard())
