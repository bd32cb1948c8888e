"""Whether the values of the slimming fields are in range, and of the right type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from .budgets import SPARSITIES, check_budgets
from .choices import CriterionName, DistillSource, LiveChoice, ScheduleName, ScopeName

_TIMES = ("slim_start", "slim_end", "slim_frequency")
_CHOICES = {
    "slim_schedule": ScheduleName,
    "slim_criterion": CriterionName,
    "slim_scope": ScopeName,
    "slim_live": LiveChoice,
    "slim_distill_from": DistillSource,
}
_WHOLE = ("slim_round_to", "slim_min_heads")
_WILDCARD = re.compile(r"[*?]|\[.+\]")
"""What makes a name a shell-style pattern."""


def check_whole(name: str, value: Any) -> None:
    """Refuse what is not a whole number from 1.

    Args:
        name: What the value is called, for the message.
        value: The value.

    Raises:
        ValueError: If it is something else; the message quotes it.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")


def check_number(values: Any, key: str, called: Mapping[str, str] = MappingProxyType({})) -> float:
    """Refuse what is not a number.

    Args:
        values: What has the field.
        key: The field.
        called: What messages call a field, where that is not its name.

    Returns:
        The value.

    Raises:
        ValueError: If it is something else; the message quotes it.
    """
    value = getattr(values, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{called.get(key, key)} must be a number, got {value!r}: give a Python int or float.")
    return value


def check_settings(values: Any, called: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse values of the slimming fields that are out of range; whole numbers and lists of patterns are made such.

    Args:
        values: What has the slimming fields; changed in place.
        called: What messages call a field, where that is not its name.

    Raises:
        ValueError: If a value is out of range; the message quotes it.
    """
    names = {name: called.get(name, name) for name in (*SPARSITIES, *_TIMES, *_CHOICES, *_WHOLE)}
    for key in SPARSITIES:
        value = check_number(values, key, names)
        if not 0 <= value < 1:
            raise ValueError(f"{names[key]} must be in [0, 1), got {value}: it is the fraction to remove.")
        setattr(values, key, float(value))  # a hyperparameter search keeps the type
    _check_times(values, names)
    for key, kind in _CHOICES.items():
        value = getattr(values, key)
        if not any(value is choice or (value == choice and isinstance(value, str)) for choice in get_args(kind)):
            choices = ", ".join(map(str, get_args(kind)))
            raise ValueError(f"{names[key]} must be one of {choices}, got {value!r}.")
    for key in _WHOLE:
        check_whole(names[key], getattr(values, key))
    check_budgets(values)
    if isinstance(values.slim_exclude, str):
        values.slim_exclude = [values.slim_exclude]
    if values.slim_exclude is not None:
        values.slim_exclude = _check_patterns(values.slim_exclude)


def _check_times(values: Any, names: Mapping[str, str]) -> None:
    start, end, frequency = (names[key] for key in _TIMES)
    for key in _TIMES:
        value = check_number(values, key, names)
        if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            raise ValueError(
                f"{names[key]} must be a step (a whole number from 1) or a fraction of training (in [0, 1)), "
                f"got {value}."
            )
        if key == "slim_end" and value == 1 and isinstance(value, float):
            raise ValueError(
                f"{end}=1.0 is ambiguous: write the step 1 as a whole number. To prune until late, leave "
                f"some of it for recovery, as with {end}=0.9."
            )
        if value >= 1:
            setattr(values, key, int(value))
    if values.slim_frequency == 0:
        raise ValueError(f"{frequency} must be above 0, got 0: it is the distance between two pruning steps.")
    if (values.slim_start < 1) == (values.slim_end < 1) and values.slim_start > values.slim_end:
        raise ValueError(f"{start} must not be after {end}, got {start}={values.slim_start}, {end}={values.slim_end}.")


def _check_patterns(patterns: Any) -> list[str]:
    if not isinstance(patterns, (list, tuple)):
        raise ValueError(f"slim_exclude must be a list of patterns, got {patterns!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"slim_exclude must hold patterns, that is strings that are not empty, got {pattern!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            if not _WILDCARD.search(pattern):
                raise ValueError(
                    f"slim_exclude: {pattern!r} is neither a shell-style pattern nor a regular expression: {error}."
                ) from error
    return list(patterns)
