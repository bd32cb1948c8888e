"""Tensors that are whole in every process; and what is done alike with parts of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..structures import get_tensor
from .offloaded_weights import read_tensor
from .tiles import find_nonzero, sum_tiles

Place = tuple[str, int]
"""The dotted name of a tensor, and one of its dimensions."""
Zeros = Sequence[tuple[str, int, torch.Tensor]]
"""Names of tensors, dimensions and the positions at which they are to be zero."""


class WholeTensors:
    """The shards of one process, or of several that hold a copy each (DDP); see `Shards`."""

    scores_before_step = False

    @torch.no_grad()
    def sum_products(
        self, model: nn.Module, places: Iterable[Place], function: Callable[..., torch.Tensor], *, gradient: bool
    ) -> dict[Place, torch.Tensor]:
        """Sum a function of weight and gradient, tile by tile."""

        def sum_own(name: str, dim: int) -> torch.Tensor:
            tensor = get_tensor(model, name)
            weight = self._local(tensor)
            if not gradient:
                return sum_tiles(dim, function, weight)
            if tensor.grad is None:
                return torch.zeros(weight.shape[dim], device=weight.device)
            return sum_tiles(dim, function, weight, self._local(tensor.grad))

        return self._add_up(model, {place: sum_own(*place) for place in places})

    @torch.no_grad()
    def find_nonzero(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, torch.Tensor]:
        """Find positions that are not zero, also of weights that accelerate keeps elsewhere."""
        own = {(name, dim): find_nonzero(dim, self._local(read_tensor(model, name))).float() for name, dim in places}
        return {place: (count > 0).cpu() for place, count in self._add_up(model, own).items()}

    def find_own(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
        """The positions in the part that this process holds, counted from its begin, on its device."""
        local = self._local(tensor)
        where = where - self._begin(tensor, dim)
        return where[(where >= 0) & (where < local.shape[dim])].to(local.device)

    @torch.no_grad()
    def write_zeros(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> None:
        """Write zeros."""
        local = self._local(tensor)
        local.index_fill_(dim, where.to(local.device), 0)

    @torch.no_grad()
    def find_returned(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """Look at the zeros."""
        return _tell([self._has_other(get_tensor(model, name), dim, where) for name, dim, where in zeros])

    @torch.no_grad()
    def find_restless(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """Those that the step has moved, those with a gradient, and those without any gradient to judge by."""
        flags = []
        for name, dim, where in zeros:
            tensor = get_tensor(model, name)
            flag = self._has_other(tensor, dim, where)
            if tensor.requires_grad and tensor.grad is None:
                flag = torch.ones_like(flag)
            elif tensor.requires_grad:
                gradient = find_nonzero(dim, self._local(tensor.grad))  # type: ignore[arg-type]
                flag = flag | gradient[where].any() | gradient.any().logical_not()
            flags.append(flag)
        return _tell(flags)

    def call_before_step(self, function: Callable[[], None]) -> Callable[[], None]:
        """Nothing: units are scored in `on_pre_optimizer_step`."""
        return lambda: None

    def clip_factor(self) -> float:
        """1: gradients are clipped before `on_pre_optimizer_step`."""
        return 1.0

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that this process holds, sharing its memory."""
        return tensor.detach()

    def _begin(self, tensor: torch.Tensor, dim: int) -> int:
        """Where along a dimension this process's part of a tensor begins."""
        return 0

    def _add_up(self, model: nn.Module, parts: Mapping[Place, torch.Tensor]) -> dict[Place, torch.Tensor]:
        """The sums over all processes of a number for each position that this process holds, with one message."""
        return dict(parts)

    def _has_other(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
        return self._local(tensor).index_select(dim, where).any()


def _tell(flags: Sequence[torch.Tensor]) -> list[bool]:
    """The values of flags, for which the device is waited once."""
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
