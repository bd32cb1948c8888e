"""Scores and zeros where DeepSpeed ZeRO spreads gradients, fp32 weights and parameters over ranks.

Every rank sums over, and writes into, the part of a tensor that it owns; no tensor is gathered but for saving.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ..structures import get_tensor
from .whole_tensors import Place, Zeros

_SUPPORTED = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"}


class ZeroPartitions:
    """The shards of DeepSpeed ZeRO 1, 2 and 3, which are ranges of flattened tensors; see `Shards`.

    Args:
        optimizer: DeepSpeed's optimizer.

    Raises:
        RuntimeError: If it is in use in a way that hides gradients or weights.
    """

    scores_before_step = True  # accelerate runs backward and step in one call

    def __init__(self, optimizer: Any) -> None:
        """See the class."""
        _refuse(optimizer)
        self._optimizer = optimizer

    def sum_products(
        self, model: nn.Module, places: Iterable[Place], function: Callable[..., torch.Tensor], *, gradient: bool
    ) -> dict[Place, torch.Tensor]:
        """Sum a function of the fp32 weight and the gradient, which is not clipped yet, in the parts of all ranks."""
        chosen = list(places)
        if not chosen:
            return {}
        sums = [_sum_own(get_tensor(model, name), dim, function, gradient=gradient) for name, dim in chosen]
        total = torch.cat(sums)
        distributed.all_reduce(total, group=self._optimizer.dp_process_group)
        if gradient:
            total /= getattr(self._optimizer, "loss_scale", 1.0)  # BF16_Optimizer has none
        return dict(zip(chosen, total.split([len(part) for part in sums]), strict=True))

    def find_nonzero(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, torch.Tensor]:
        """Find positions at which fp32 weights are not zero."""
        counts = self.sum_products(model, places, lambda weight: (weight != 0).float(), gradient=False)
        return {place: (count > 0).cpu() for place, count in counts.items()}

    def find_own(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
        """All of them: what this rank owns is no range of positions."""
        return where

    @torch.no_grad()
    def write_zeros(self, tensor: Any, dim: int, where: torch.Tensor) -> None:
        """Write zeros into a parameter and into its fp32 master copy, without any message."""
        if tensor.shape == whole_shape(tensor):
            tensor.data.index_fill_(dim, where.to(tensor.device), 0)
        start, length = _own_range(tensor)
        if not length or not is_partitioned(tensor) and not hasattr(tensor, "_hp_mapping"):
            return
        dropped = _own_mask(tensor, dim, where, start, length)
        if is_partitioned(tensor):
            tensor.ds_tensor.data[:length].masked_fill_(dropped.to(tensor.ds_tensor.device), 0)
        if tensor.requires_grad:
            weight = _own_weight(tensor)
            weight[:length].masked_fill_(dropped.to(weight.device), 0)
            if is_partitioned(tensor):  # what was read may be a copy, where the optimizer is offloaded
                from deepspeed.utils import safe_set_local_fp32_param

                safe_set_local_fp32_param(tensor, weight)

    def find_returned(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """Look at the zeros in whole tensors; the same on every rank."""
        used = self.find_nonzero(model, dict.fromkeys((name, dim) for name, dim, _ in zeros))
        return [bool(used[name, dim][where].any()) for name, dim, where in zeros]

    def find_restless(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """All of them: the state of the optimizer, which moves them, is not looked at."""
        return [True] * len(zeros)

    def call_before_step(self, function: Callable[[], None]) -> Callable[[], None]:
        """Wrap the optimizer's step."""
        step = self._optimizer.step

        @functools.wraps(step)
        def step_after(*args: Any, **kwargs: Any) -> Any:
            function()
            return step(*args, **kwargs)

        self._optimizer.step = step_after
        return lambda: setattr(self._optimizer, "step", step)

    def clip_factor(self) -> float:
        """What DeepSpeed, which clips in its step, has multiplied the gradients with."""
        if not self._optimizer.clip_grad:
            return 1.0
        return min(1.0, float(self._optimizer.clip_grad / (self._optimizer._global_grad_norm + 1e-6)))


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether stage 3 has taken a parameter apart."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of a tensor, also of a parameter that stage 3 has taken apart."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Give the parameters that stage 3 has taken apart their shapes back, without values, for `find_structures`.

    Args:
        model: Any model; unchanged afterwards.
    """
    kept = [(p, p.data) for p in model.parameters() if p.shape != whole_shape(p)]
    try:
        for parameter, data in kept:
            parameter.data = data.new_empty(()).expand(whole_shape(parameter))
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the weights of a model to the CPU of rank 0, one parameter at a time; to be called by all ranks.

    Args:
        model: The model itself, not the engine around it.

    Returns:
        As `model.state_dict()`, tied weights as one tensor; empty on the other ranks.
    """
    from deepspeed.runtime.zero import GatheredParameters

    copies: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with GatheredParameters([tensor]):
            if distributed.get_rank() == 0:
                state[name] = copies.setdefault(id(tensor), tensor.detach().to("cpu", copy=True))
    return state


@torch.no_grad()
def _sum_own(tensor: torch.Tensor, dim: int, function: Callable[..., torch.Tensor], *, gradient: bool) -> torch.Tensor:
    """The sums over the part that this rank owns; gradients are those of the loss times the loss scale."""
    shape = whole_shape(tensor)
    stride, size = shape[dim + 1 :].numel(), shape[dim]
    start, length = _own_range(tensor)
    if not length or (gradient and not tensor.requires_grad):
        return torch.zeros(size, device=tensor.device)
    weight = _own_weight(tensor)[:length]
    values = function(weight, _own_gradient(tensor)[:length]) if gradient else function(weight)
    rows = _pad(values.float(), start, stride).view(-1, stride).sum(1)
    return _pad(rows, start // stride, size).view(-1, size).sum(0).to(tensor.device)


def _refuse(optimizer: Any) -> None:
    """Refuse ways to use DeepSpeed that hide gradients or weights."""
    kind = type(optimizer).__name__
    if kind not in _SUPPORTED:
        raise RuntimeError(
            f"DeepSpeed's optimizer is {kind}, which cannot be slimmed; set the ZeRO stage to 1, 2 or 3."
        )
    if distributed.get_world_size(optimizer.dp_process_group) != distributed.get_world_size():
        raise RuntimeError("DeepSpeed splits the model by tensor or pipeline parallelism; slimming needs ZeRO alone.")
    if getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise RuntimeError('DeepSpeed keeps parameters on NVMe; set offload_param.device to "cpu" or "none" to slim.')


def _own_range(tensor: Any) -> tuple[int, int]:
    """Start and length of what this rank owns of the flattened tensor; rank 0 owns what is not taken apart."""
    if is_partitioned(tensor):
        part = tensor.ds_tensor.numel()
        start = part * distributed.get_rank(tensor.ds_process_group)
        return start, max(0, min(part, whole_shape(tensor).numel() - start))
    if hasattr(tensor, "_hp_mapping"):
        mapping = tensor._hp_mapping
        return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
    return 0, tensor.numel() if distributed.get_rank() == 0 else 0


def _own_weight(tensor: Any) -> torch.Tensor:
    """The fp32 weights that this rank owns, flat, with padding; a copy at stage 3 with offloading."""
    if is_partitioned(tensor):
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(tensor) if tensor.requires_grad else tensor.ds_tensor.data.float()
    if hasattr(tensor, "_hp_mapping"):
        return tensor._hp_mapping.hp_fragment
    return tensor.detach().flatten().float()


def _own_gradient(tensor: Any) -> torch.Tensor:
    """The gradients that this rank owns, reduced over the ranks, flat, with padding."""
    if is_partitioned(tensor):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(tensor)
    mapping = tensor._hp_mapping
    gradient = mapping.get_lp_grad_fragment(tensor._index_in_param_group).flatten().float()
    address = mapping.lp_fragment_address  # BF16_Optimizer keeps whole gradients on each rank
    return gradient[address.start :] if len(gradient) == tensor.numel() else gradient


def _own_mask(tensor: torch.Tensor, dim: int, where: torch.Tensor, start: int, length: int) -> torch.Tensor:
    shape = whole_shape(tensor)
    stride, size = shape[dim + 1 :].numel(), shape[dim]
    first = start // stride
    rows = (start + length - 1) // stride - first + 1
    mask = torch.zeros(size, dtype=torch.bool, device=where.device).index_fill_(0, where, True)
    mask = mask.roll(-(first % size)).repeat(rows // size + 1)[:rows]
    return mask.repeat_interleave(stride)[start % stride :][:length]


def _pad(values: torch.Tensor, start: int, period: int) -> torch.Tensor:
    return F.pad(values, (start % period, -(start + len(values)) % period))
