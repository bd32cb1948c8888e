"""Where the weights and gradients of a training are: asked once, at its beginning, and held from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from .deepspeed_zero import ZeroPartitions, find_zero_optimizer
from .sharded_tensors import ShardedTensors, is_sharded
from .whole_tensors import Place, WholeTensors, Zeros


class Shards(Protocol):
    """What scoring and zeroing ask of the weights, whatever part of them a process holds.

    Every process has to call `sum_products` and `find_nonzero`, with the same places in the same order. They send one
    message in all, of sums: no process gathers a tensor.
    """

    @property
    def scores_before_step(self) -> bool:
        """Whether gradients are there only in `call_before_step`, and not in `on_pre_optimizer_step`."""

    def sum_products(
        self, model: nn.Module, places: Iterable[Place], function: Callable[..., torch.Tensor], *, gradient: bool
    ) -> dict[Place, torch.Tensor]:
        """Sum a function of weight and gradient over all dimensions but one, in whole tensors.

        Args:
            model: The model.
            places: Dotted names of tensors, and their dimensions.
            function: Elementwise, of the weight, or of it and the gradient, in float32 or summed up in it.
            gradient: Whether the function takes the gradient, as it is before the optimizer step.

        Returns:
            For each place a float32 tensor of shape `[size of dim]`; zeros where the gradient is missing.
        """

    def find_nonzero(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, torch.Tensor]:
        """Find the positions at which whole tensors are not all zero.

        Args:
            model: The model; its weights may be kept elsewhere by accelerate.
            places: Dotted names of tensors, and their dimensions.

        Returns:
            For each place a boolean tensor of shape `[size of dim]` on the CPU.
        """

    def find_own(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
        """Find which positions `write_zeros` writes in this process, to be worked out once for many steps.

        Args:
            tensor: A tensor of the model.
            dim: The dimension.
            where: Positions in the whole tensor, int64 on the CPU.

        Returns:
            The positions as `write_zeros` takes them.
        """

    def write_zeros(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> None:
        """Write zeros into this process's part of a tensor and of its master copy, if it has one.

        Args:
            tensor: A tensor of the model, or one of its shape that an optimizer keeps for it; changed in place.
            dim: The dimension.
            where: From `find_own`.
        """

    def find_returned(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """Say which zeros have been written over; of a tensor that is sharded, as far as this process holds it.

        Args:
            model: The model, or a copy of it.
            zeros: What was written.

        Returns:
            For each of the zeros whether any is something else now.
        """

    def find_restless(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """Say which zeros have to be written again after every optimizer step.

        Args:
            model: The model, after the first step since they were written, with its gradients.
            zeros: What was written.

        Returns:
            For each of the zeros whether the step has moved any or a later one may.
        """

    def call_before_step(self, function: Callable[[float], None]) -> Callable[[], None]:
        """Have a function called when the gradients of an optimizer step are reduced and not yet used.

        Args:
            function: Called in every process before each optimizer step, also one that an overflow skips, with the
                loss scale, by which gradients are too large; only where `scores_before_step`.

        Returns:
            A function that undoes this.
        """

    def clip_factor(self) -> float:
        """What gradients were multiplied with by clipping after they were scored; known after the optimizer step."""


def find_shards(model: nn.Module, optimizer: Any = None) -> Shards:
    """Find out where the weights and gradients of a training are.

    Args:
        model: The model, as it has been prepared for the training.
        optimizer: What the Trainer hands to callbacks, if there is one.

    Returns:
        Those of one process (or of several with a copy each), of FSDP2, or of DeepSpeed ZeRO.

    Raises:
        RuntimeError: If DeepSpeed is in use in a way that hides gradients or weights.
    """
    zero_optimizer = find_zero_optimizer(optimizer)
    if zero_optimizer is not None:
        return ZeroPartitions(zero_optimizer)
    return ShardedTensors() if any(map(is_sharded, model.parameters())) else WholeTensors()
