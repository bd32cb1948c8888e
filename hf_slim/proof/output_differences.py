"""How far what two models compute is apart, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .output_comparison import FILL, PART


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of two models is apart.

    Args:
        name: The output.
        absolute: The largest difference; NaN where one of them is NaN.
        relative: That over the largest output of the first model.
    """

    name: str
    absolute: float
    relative: float


def measure_differences(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> tuple[OutputDifference, ...]:
    """Measure how far outputs are apart, of those that have the same name and shape.

    What masks are filled with, infinity too, counts only where the other model has something else.

    Args:
        first: Outputs of one model.
        second: Outputs of the other for the same inputs.

    Returns:
        For each output the largest difference.
    """
    return tuple(
        _measure(name, values, second[name])
        for name, values in first.items()
        if name in second and values.shape == second[name].shape and values.numel()
    )


def _measure(name: str, first: torch.Tensor, second: torch.Tensor) -> OutputDifference:
    scale, largest = 0.0, torch.zeros((), dtype=torch.float64)
    for one, other in zip(first.reshape(-1).split(PART), second.reshape(-1).split(PART), strict=True):
        size = one.double().abs()
        scale = max(scale, float(size.masked_fill(~(size < FILL), 0).max()))
        difference = (one.double() - other.to(one.device).double()).abs().masked_fill(one == other, 0)
        largest = torch.maximum(largest, difference.max().cpu())  # which hands on NaN
    return OutputDifference(name, float(largest), float(largest) / scale if scale else float(largest))
