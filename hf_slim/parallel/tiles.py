"""Sums over and copies of weights along one dimension, without temporaries of the size of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_CPU_TILE = 1 << 17
"""Elements of a tile on a CPU: a few tiles fit into the second-level cache of a core."""
_DEVICE_TILE = 1 << 22
"""Elements of a tile elsewhere: enough to keep a GPU busy."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of as many bytes, whose values are moved faster than those of floating-point types."""


def sum_tiles(dim: int, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Sum a function of the elements of tensors over all dimensions but one.

    Args:
        dim: The dimension that remains.
        function: Elementwise.
        *tensors: Tensors of the same shape, which the function takes.

    Returns:
        float32 tensor of shape `[size of dim]`; sums are taken in float32 whatever the type of the tensors.
    """
    first = tensors[0]
    others = [d for d in range(first.dim()) if d != dim]
    rows = _rows_of_a_tile(first)
    if dim == 0:
        values = (
            function(*(part.float() for part in tile))
            for tile in zip(*(tensor.split(rows) for tensor in tensors), strict=True)
        )
        return torch.cat([value.sum(others) if others else value for value in values])
    total = torch.zeros((rows, *first.shape[1:]), dtype=torch.float32, device=first.device)
    for tile in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        if function is torch.mul:
            total.narrow(0, 0, len(tile[0])).addcmul_(*tile)
        else:
            total.narrow(0, 0, len(tile[0])).add_(function(*(part.float() for part in tile)))
    return total.sum(others)


def find_nonzero(dim: int, tensor: torch.Tensor) -> torch.Tensor:
    """Find the positions along a dimension at which a tensor is not all zero.

    Args:
        dim: The dimension that remains.
        tensor: The tensor.

    Returns:
        Boolean tensor of shape `[size of dim]`; NaN and the smallest numbers are not zero.
    """
    others = [d for d in range(tensor.dim()) if d != dim]
    if not others:
        return tensor != 0
    if not tensor.numel() or tensor.element_size() == 1:  # of those types no maxima can be had
        return (tensor != 0).any(dim=others)
    return (tensor.amax(others) != 0) | (tensor.amin(others) != 0)


def take_positions(tensor: torch.Tensor, dim: int, keep: torch.Tensor) -> torch.Tensor:
    """Copy some positions along a dimension of a tensor.

    Args:
        tensor: The tensor.
        dim: The dimension.
        keep: Boolean tensor of shape `[size of dim]` on the CPU, True for the positions that are wanted.

    Returns:
        A contiguous tensor with memory of its own.
    """
    if tensor.is_meta:
        return tensor.new_empty((*tensor.shape[:dim], int(keep.sum()), *tensor.shape[dim + 1 :]))
    # Heads keep ranges: whole blocks are copied, of the largest size that all ranges are multiples of.
    block = math.gcd(len(keep), *((keep[1:] != keep[:-1]).nonzero().flatten() + 1).tolist())
    index = keep[::block].nonzero().flatten().to(tensor.device)
    blocks = tensor.unflatten(dim, (-1, block))
    if blocks.shape[dim + 1 :].numel() > 1 or dim == 0:
        return blocks.index_select(dim, index).flatten(dim, dim + 1).contiguous()
    # Single values, for which `index_select` is slow.
    left = (*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :])
    bits = tensor.view(_BITS[tensor.element_size()])
    return bits.gather(dim, index.view(-1, *(1,) * (tensor.dim() - dim - 1)).expand(left)).view(tensor.dtype)


def _rows_of_a_tile(tensor: torch.Tensor) -> int:
    """How many rows of a tensor make a tile.

    Never more than a quarter of them, where there are so many, but for small tensors elsewhere than on a CPU: there
    each tile is a kernel, and starting it is all that it takes.
    """
    is_cpu = tensor.device.type == "cpu"
    tile = _CPU_TILE if is_cpu else _DEVICE_TILE
    rows = len(tensor)
    if not is_cpu and 0 < tensor.numel() <= tile:
        return rows
    return max(1, min(tile * rows // max(1, tensor.numel()), -(-rows // 4)))
