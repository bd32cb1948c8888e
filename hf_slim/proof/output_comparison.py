"""What a model computes, and the comparison of what two models make of the same inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..parallel import find_device
from .higher_precision import is_narrow, widened
from .made_inputs import RUN_ERRORS, describe, evaluating

__all__ = [
    "VerificationError",
    "check_verify",
    "compare_models",
    "compare_outputs",
    "compare_runs",
    "compute_outputs",
    "widened",
]

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference allowed, relative to the largest output."""
ABSOLUTE = 0.1
"""Outputs smaller than this are compared as if they were so large: they may be differences of larger numbers."""
FILL = 1e8
"""Outputs from here on are no results but what masks are filled with: each is compared by itself."""

HALF = (torch.float16, torch.bfloat16)
"""Types in which nothing is compared."""
PART = 1 << 22
"""So many elements are compared at a time: outputs for a large vocabulary are as large as a model."""
_SHAPED_BY_UNITS = ("past_", "cache", "attentions")

Outputs = dict[str, torch.Tensor]
Run = Callable[[torch.dtype], Outputs]
"""What gives the outputs of a model, computed in a type."""


class VerificationError(RuntimeError):
    """The slimmed model does not compute what the masked model computed."""


def check_verify(verify: Any) -> None:
    """Refuse a value of `verify` that is none.

    Args:
        verify: True, False or a batch.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(verify, (bool, Mapping)) or (isinstance(verify, Mapping) and not verify):
        raise ValueError(f"verify must be True, False or a batch (a dict of the model's inputs), got {verify!r}.")
    if isinstance(verify, Mapping) and not all(isinstance(name, str) for name in verify):
        raise ValueError(f"verify: the inputs of a batch are named by strings, got {list(verify)}.")


def compute_outputs(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Outputs:
    """Run a model in evaluation mode, with the same random numbers every time.

    Args:
        model: The model; it is as before afterwards.
        inputs: Keyword arguments for its forward pass, on any device.
        dtype: What is of a narrower type is computed in this one: half precision in `torch.float32`, and all in
            `torch.float64`.

    Returns:
        Every floating-point tensor among its outputs, by name; without caches and attention probabilities, which have
        the shape of the units.

    Raises:
        ValueError: If the model cannot run on these inputs; the message says how to pass a batch.
    """
    inputs = send_to_device(dict(inputs), find_device(model))
    try:
        with evaluating(model), widened(model, dtype) if is_narrow(model, inputs, dtype) else nullcontext():
            outputs = dict(find_tensors(model(**inputs), ""))
    except RUN_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__} cannot run on {describe(inputs)}: {error}. Pass a batch of yours, "
            "verify={...}, or verify=False."
        ) from error
    return {name: value.to(dtype) if value.dtype in HALF else value for name, value in outputs.items()}


def compare_models(masked: nn.Module, slim: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse two models that compute different outputs; see `compare_runs`.

    Args:
        masked: The model with zero units.
        slim: The model without them. It may have other outputs in addition.
        inputs: Keyword arguments for the forward pass of both.

    Raises:
        ValueError: If one of them cannot run.
        VerificationError: If they differ.
    """
    names: set[str] = set()

    def run_masked(dtype: torch.dtype) -> Outputs:
        outputs = compute_outputs(masked, inputs, dtype)
        names.update(outputs)
        return outputs

    def run_slim(dtype: torch.dtype) -> Outputs:
        return {name: value for name, value in compute_outputs(slim, inputs, dtype).items() if name in names}

    compare_runs(run_masked, run_slim)


def compare_runs(run_masked: Run, run_slim: Run) -> None:
    """Refuse two models that compute different outputs in float32, and in float64 too if they can run so.

    Models amplify rounding, some (vocoders) by far more than the tolerance, so that float64 decides.

    Args:
        run_masked: Gives the outputs of the masked model.
        run_slim: Gives those of the slimmed one; it is asked for after the other.

    Raises:
        ValueError: If one of them cannot run.
        VerificationError: If they differ; the message says where and by how much.
    """
    try:
        compare_outputs(run_masked(torch.float32), run_slim(torch.float32))
    except VerificationError:
        try:
            runs = run_masked(torch.float64), run_slim(torch.float64)
        except ValueError:
            runs = None  # no kernel for it: float32 decides
        if runs is None:
            raise
        compare_outputs(*runs)


def compare_outputs(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]) -> None:
    """Refuse outputs that differ.

    Args:
        expected: Outputs of the masked model.
        actual: Outputs of the slimmed model.

    Raises:
        VerificationError: If they differ by more than rounding, or cannot be compared; the message says where and by
            how much. An infinity is no difference where both have the same.
    """
    if expected.keys() != actual.keys():
        raise VerificationError(f"The outputs are {sorted(actual)} instead of {sorted(expected)}.")
    for name, wanted in expected.items():
        got = actual[name]
        if not is_comparable(wanted):
            raise VerificationError(
                f"The masked model's {name} holds NaN or nothing but infinity, so it cannot be compared: the training "
                "has diverged, or the batch is unfit."
            )
        if wanted.shape != got.shape:
            raise VerificationError(
                f"The slimmed model's {name} has shape {tuple(got.shape)} instead of {tuple(wanted.shape)}."
            )
        wrong = _find_difference(wanted.reshape(-1), got.reshape(-1)) if wanted.numel() else None
        if wrong is not None:
            difference, allowed = wrong
            raise VerificationError(
                f"The slimmed model's {name} differs from the masked model's by {difference:.3g} (allowed: "
                f"{allowed:.3g})."
            )


def is_comparable(outputs: torch.Tensor) -> bool:
    """Whether outputs hold no NaN, and something else than infinity."""
    return not bool(outputs.isnan().any()) and (not outputs.numel() or bool(outputs.isfinite().any()))


def _find_difference(wanted: torch.Tensor, got: torch.Tensor) -> tuple[float, float] | None:
    """The largest difference that is not allowed, and the largest that would be where one is; part by part."""
    limit = min(FILL, torch.finfo(wanted.dtype).max / 2)
    tolerance = TOLERANCES.get(wanted.dtype, TOLERANCES[torch.float32])
    scale = 0.0
    for part in wanted.split(PART):
        size = part.double().abs()
        scale = max(scale, float(size.masked_fill(size >= limit, 0).max()))
    wrong = []
    for part, other in zip(wanted.split(PART), got.split(PART), strict=True):
        size = part.double().abs()
        difference = (part.double() - other.double()).abs().masked_fill(part == other, 0)
        allowed = tolerance * size.masked_fill(size < limit, scale + ABSOLUTE).masked_fill(size.isinf(), 0)
        where = ~(difference <= allowed)
        if where.any():
            wrong.append(torch.stack([difference[where].max(), allowed[where].max()]))
    if not wrong:
        return None
    difference, allowed = torch.stack(wrong).amax(0).tolist()
    return difference, allowed


def find_tensors(outputs: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield prefix or "output", outputs
        return
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, Mapping):
        outputs = vars(outputs)
    if isinstance(outputs, Mapping):
        for key, value in outputs.items():
            if not any(word in str(key) for word in _SHAPED_BY_UNITS):
                yield from find_tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(outputs, (list, tuple)):
        for number, value in enumerate(outputs):
            yield from find_tensors(value, f"{prefix}[{number}]")
