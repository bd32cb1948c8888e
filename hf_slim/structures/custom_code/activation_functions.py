"""Whether an activation is a function of each element by itself: by numbers."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_mixed: dict[Hashable, str | None] = {}


class InconclusiveError(Exception):
    """A module cannot be called on tensors that are made for it, so that numbers say nothing about it."""


def find_mixed(function: Callable[[torch.Tensor], Any]) -> str | None:
    """Find out, once for each activation that is known by more than its identity, whether it mixes elements.

    Args:
        function: A module or a function; not changed.

    Returns:
        What it does otherwise, None if it is a function of each element by itself.

    Raises:
        InconclusiveError: If it is not a function of a tensor alone.
    """
    if isinstance(function, nn.Module):
        if any(True for _ in function.parameters()):
            raise InconclusiveError("it has parameters")
        known = type(function).__module__.startswith(("torch.", "transformers."))
        key: Hashable = (type(function), repr(function)) if known else None
        function = copy.deepcopy(function).eval()
    else:
        key = function if is_plain_function(function) else None
    if key is None:
        return _try(function)
    if key not in _mixed:
        _mixed[key] = _try(function)
    return _mixed[key]


def is_elementwise(function: Callable[[torch.Tensor], Any]) -> bool:
    """Whether something can be called with a tensor and is a function of each element by itself."""
    try:
        return find_mixed(function) is None
    except InconclusiveError:
        return False


def is_plain_function(value: Any) -> bool:
    """Whether something is a function that depends on nothing but what it is given.

    Args:
        value: Anything.

    Returns:
        True for a function without a closure.
    """
    return inspect.isbuiltin(value) or (inspect.isfunction(value) and value.__closure__ is None)


def _try(function: Callable[[torch.Tensor], Any]) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(4, 6, 8, generator=generator, device="cpu", dtype=torch.float64)
    changed = values.clone()
    changed[..., 3] += 1
    try:
        with torch.no_grad(), calm():
            before = function(values)
        with torch.no_grad(), calm():
            after = function(changed)
    except Exception as error:  # it wants something else than one tensor
        raise InconclusiveError("it cannot be called with a tensor") from error
    if not isinstance(before, torch.Tensor):
        raise InconclusiveError("it gives no tensor")
    if before.shape != values.shape:
        return f"makes {tuple(before.shape)} of {tuple(values.shape)}"
    others = torch.arange(8, device="cpu") != 3
    return None if torch.equal(before[..., others], after[..., others]) else "makes channels depend on one another"


@contextmanager
def calm() -> Iterator[None]:
    """Run on the CPU with the same random numbers each time and without warnings; others have theirs as before."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(0)
    try:
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.default_generator.set_state(state)
