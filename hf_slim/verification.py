"""What a model computes, and the comparison of what two models make of the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from .inputs import RUN_ERRORS, describe, evaluating
from .offloading import find_device

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference allowed, relative to the largest output; other types are allowed `LOW_PRECISION`."""
LOW_PRECISION = 0.05
ABSOLUTE = 0.1
"""Outputs smaller than this are compared as if they were so large: they may be differences of larger numbers."""
FILL = 1e8
"""Outputs from here on are no results but what masks are filled with: each is compared by itself."""

_SHAPED_BY_UNITS = ("past_", "cache", "attentions")


class VerificationError(RuntimeError):
    """The slimmed model does not compute what the masked model computed."""


def compute_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Run a model in evaluation mode, with the same random numbers every time.

    Args:
        model: The model; its training mode is restored afterwards.
        inputs: Keyword arguments for its forward pass, on any device.

    Returns:
        Every floating-point tensor among its outputs, by name; without caches and attention probabilities, which have
        the shape of the units.

    Raises:
        ValueError: If the model cannot run on these inputs; the message says how to pass a batch.
    """
    try:
        with evaluating(model):
            outputs = model(**send_to_device(dict(inputs), find_device(model)))
    except RUN_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__} cannot run on {describe(inputs)}: {error}. Pass a batch of yours, "
            "verify={...}, or verify=False."
        ) from error
    return dict(_tensors(outputs, ""))


def compare_outputs(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]) -> None:
    """Refuse two models that differ.

    Args:
        expected: Outputs of the masked model.
        actual: Outputs of the slimmed model.

    Raises:
        VerificationError: If they differ by more than rounding, or cannot be compared; the message says where and by
            how much. An infinity is no difference where both have the same.
    """
    if expected.keys() != actual.keys():
        raise VerificationError(f"The outputs are {sorted(actual)} instead of {sorted(expected)}. Nothing was saved.")
    for name, wanted in expected.items():
        got = actual[name]
        if wanted.isnan().any() or (wanted.numel() and not wanted.isfinite().any()):
            raise VerificationError(
                f"The masked model's {name} holds NaN or nothing but infinity, so it cannot be compared: the training "
                "has diverged, or the batch is unfit. Nothing was saved."
            )
        if wanted.shape != got.shape:
            raise VerificationError(
                f"The slimmed model's {name} has shape {tuple(got.shape)} instead of {tuple(wanted.shape)}. Nothing "
                "was saved."
            )
        difference, allowed = _differences(wanted, got)
        wrong = ~(difference <= allowed)
        if wrong.any():
            raise VerificationError(
                f"The slimmed model's {name} differs from the masked model's by {float(difference[wrong].max()):.3g} "
                f"(allowed: {float(allowed[wrong].max()):.3g}). Nothing was saved. A structure was taken for "
                "something that it is not: please report the model class, and leave it out with slim_exclude."
            )


def _differences(wanted: torch.Tensor, got: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The absolute differences of two tensors, and those that are allowed."""
    size = wanted.double().abs()
    fills = size >= min(FILL, torch.finfo(wanted.dtype).max / 2)
    scale = size[~fills].max() + ABSOLUTE if not fills.all() else size.new_tensor(ABSOLUTE)
    tolerance = TOLERANCES.get(wanted.dtype, LOW_PRECISION)
    difference = (wanted.double() - got.double()).abs().masked_fill(wanted == got, 0)
    return difference, tolerance * torch.where(fills, size.masked_fill(size.isinf(), 0), scale)


def _tensors(outputs: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield prefix or "output", outputs
        return
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping):
        outputs = vars(outputs)
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            if not any(word in str(key) for word in _SHAPED_BY_UNITS):
                yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(outputs, (list, tuple)):
        for number, value in enumerate(outputs):
            yield from _tensors(value, f"{prefix}[{number}]")
