"""What a name in code may mean while it is read, beside tensors and numbers."""

from __future__ import annotations

import types
from dataclasses import dataclass, replace
from typing import Any

from .axes import Many, Plain, Size, Star, Units


@dataclass(frozen=True)
class Child:
    """A module below the one that is read."""

    path: str


@dataclass(frozen=True)
class Known:
    """An object of Python: a function, a class, a module of Python."""

    object: Any


@dataclass(frozen=True)
class Bound:
    """A method of a value."""

    owner: Any
    name: str


@dataclass(frozen=True)
class Conflict:
    """A name that means different things after different branches."""


def wrap(value: Any) -> Any:
    """What an object of Python, which is no tensor, is for the code that is read.

    Args:
        value: The object.

    Returns:
        A number, a name or nothing with its value; functions, classes and modules as they are; of others nothing.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return Plain(value)
    if callable(value) or isinstance(value, types.ModuleType):
        return Known(value)
    return Plain()


def is_tainted(values: Any) -> bool:
    """Whether something among values depends on units, or on how many there are.

    Args:
        values: Some values, in tuples perhaps.

    Returns:
        True if one does.
    """
    return any(
        isinstance(value, (Units, Size, Conflict))
        or (isinstance(value, (tuple, list)) and is_tainted(value))
        or (isinstance(value, (Many, Star)) and is_tainted([value.value]))
        for value in values
    )


def merge(one: Any, other: Any) -> Any:
    """What a name means after two branches.

    Args:
        one: What it means after the first.
        other: What it means after the second.

    Returns:
        What both have in common, or that they have nothing.
    """
    if one == other:
        return one
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(merge(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, Plain) and isinstance(other, Plain):
        return Plain()
    if isinstance(one, Units) and isinstance(other, Units) and replace(one, rank=None) == replace(other, rank=None):
        return replace(one, rank=None)
    for value, second in ((one, other), (other, one)):
        if isinstance(value, Plain):
            return second
        if isinstance(value, Known) and callable(value.object) and not isinstance(second, Units):
            return value
    return Conflict()
