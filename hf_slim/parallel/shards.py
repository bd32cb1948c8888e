"""Where the weights and gradients of a training are: asked once, at its beginning, and held from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn

from .deepspeed_zero import ZeroPartitions
from .sharded_tensors import ShardedTensors, has_shards
from .whole_tensors import Place, WholeTensors, Zeros


class Shards(Protocol):
    """What scoring and zeroing ask of weights and gradients, whatever part of them a process holds.

    Every process has to ask for sums, for what is not zero and for what has returned, for the same places in the same
    order. Only sums are sent: no process gathers a tensor, so that units can be scored at every step.
    """

    scores_before_step: bool
    """Whether gradients are there in `call_before_step`, and not any more in `on_pre_optimizer_step`."""

    def sum_products(
        self, model: nn.Module, places: Iterable[Place], function: Callable[..., torch.Tensor], *, gradient: bool
    ) -> dict[Place, torch.Tensor]:
        """Sum a function of weight and gradient over all dimensions but one, in whole tensors.

        Args:
            model: The model.
            places: Dotted names of tensors, and their dimensions.
            function: Elementwise, of the weight, or of it and the gradient (without a loss scale).
            gradient: Whether the function takes the gradient.

        Returns:
            For each place a float32 tensor of shape `[size of dim]`; zeros where there is no gradient.
        """

    def find_nonzero(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, torch.Tensor]:
        """Find where whole tensors are not all zero: boolean tensors of shape `[size of dim]` on the CPU."""

    def find_own(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> torch.Tensor:
        """Of positions in a whole tensor those that this process holds, as `write_zeros` takes them."""

    def write_zeros(self, tensor: torch.Tensor, dim: int, where: torch.Tensor) -> None:
        """Write zeros into this process's part of a tensor, and of its master copy if it has one.

        Args:
            tensor: A tensor of the model, or one of its shape that an optimizer keeps for it; changed in place.
            dim: The dimension along which the positions lie.
            where: From `find_own`, which may be asked once for many steps.
        """

    def find_returned(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """For each of the zeros whether any has been written over, as far as this process holds them."""

    def find_restless(self, model: nn.Module, zeros: Zeros) -> list[bool]:
        """For each of the zeros whether any has to be written again after every optimizer step.

        Args:
            model: The model, after the first step since they were written, with the gradients of that step.
            zeros: What was written.

        Returns:
            True for what the step has moved and what a later one may move.
        """

    def call_before_step(self, function: Callable[[], None]) -> Callable[[], None]:
        """Have a function called where `scores_before_step`: when gradients are reduced and not yet used.

        Args:
            function: Called in every process before each optimizer step, also one that an overflow skips.

        Returns:
            A function that undoes this.
        """

    def clip_factor(self) -> float:
        """What clipping multiplied the gradients with after they were scored; known after the optimizer step."""


def find_shards(model: nn.Module, optimizer: Any = None) -> Shards:
    """Find out where the weights and gradients of a training are.

    Args:
        model: The model, as it has been prepared for the training.
        optimizer: What the Trainer hands to callbacks, if there is one.

    Returns:
        Those of one process (or of several with a copy each), of FSDP2, or of DeepSpeed ZeRO.

    Raises:
        RuntimeError: If DeepSpeed hides them.
    """
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return ZeroPartitions(optimizer.optimizer)
    return ShardedTensors() if has_shards(model) else WholeTensors()
