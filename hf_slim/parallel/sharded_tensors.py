"""Tensors of which every process holds a part (FSDP2): the part that is here, and sums over all parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..structures import get_tensor
from .whole_tensors import Place, WholeTensors


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process may hold only a part."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def has_shards(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded, also while FSDP2 has put some together for a forward pass."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(map(is_sharded, model.parameters()))


class ShardedTensors(WholeTensors):
    """The shards of FSDP2, whose tensors are parted along dimensions, or not at all; see `Shards`."""

    def _local(self, tensor: Any) -> torch.Tensor:
        with torch.no_grad():
            return (tensor.to_local() if is_sharded(tensor) else tensor).detach()

    def _begin(self, tensor: Any, dim: int) -> int:
        return tensor.__create_chunk_list__()[0].offsets[dim] if is_sharded(tensor) else 0

    def _add_up(self, model: nn.Module, parts: Mapping[Place, torch.Tensor]) -> dict[Place, torch.Tensor]:
        sums = dict(parts)
        groups: dict[tuple[Any, ...], list[Place]] = {}
        for (name, dim), part in parts.items():
            tensor: Any = get_tensor(model, name)
            if is_sharded(tensor):
                begin = self._begin(tensor, dim)
                sums[name, dim] = part.new_zeros(tensor.shape[dim])
                sums[name, dim][begin : begin + len(part)] = part
                mesh = tensor.device_mesh
                over = tuple(
                    mesh.get_group(number) for number, place in enumerate(tensor.placements) if place.is_shard()
                )
                groups.setdefault(over, []).append((name, dim))
        for members, keys in groups.items():
            together = torch.cat([sums[key] for key in keys])
            for group in members:
                dist.all_reduce(together, group=group)
            sums.update(zip(keys, together.split([len(sums[key]) for key in keys]), strict=True))
        return sums
