"""Reductions of weights along all dimensions but one, tile by tile, so that no copy of a weight is ever made."""

from __future__ import annotations

from collections.abc import Callable

import torch

_CPU_TILE = 1 << 17
"""Elements of a tile on a CPU: a few tiles fit into the second-level cache of a core."""
_DEVICE_TILE = 1 << 22
"""Elements of a tile elsewhere: enough to keep a GPU busy."""


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
    total = torch.zeros(first[:rows].shape, dtype=torch.float32, device=first.device)
    for tile in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        if function is torch.mul:
            total[: len(tile[0])].addcmul_(*tile)
        else:
            total[: len(tile[0])].add_(function(*(part.float() for part in tile)))
    return total.sum(others)


def any_tiles(dim: int, tensor: torch.Tensor) -> torch.Tensor:
    """Find the positions along a dimension at which a tensor is not all zero.

    Args:
        dim: The dimension that remains.
        tensor: The tensor.

    Returns:
        Boolean tensor of shape `[size of dim]`.
    """
    others = [d for d in range(tensor.dim()) if d != dim]
    if not others:
        return tensor != 0
    parts = [(tile != 0).any(dim=others) for tile in tensor.split(_rows_of_a_tile(tensor))]
    return torch.cat(parts) if dim == 0 else torch.stack(parts).any(0)


def _rows_of_a_tile(tensor: torch.Tensor) -> int:
    """How many rows of a tensor make a tile; never more than a quarter of them, where there are so many."""
    tile = _CPU_TILE if tensor.device.type == "cpu" else _DEVICE_TILE
    rows = len(tensor)
    return max(1, min(tile * rows // max(1, tensor.numel()), -(-rows // 4)))
