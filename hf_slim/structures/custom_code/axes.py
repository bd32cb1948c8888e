"""Where units lie in a tensor, and what an operation on the tensor makes of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


class UnreadableError(Exception):
    """Code does something to units of which it cannot be told that each is treated by itself."""


class Unknown:
    """A value that is known to have nothing to do with units, and nothing else is known of it."""


UNKNOWN = Unknown()
NARROW = Unknown()
"""Of a tensor: its last dimension is 1, so that it means the same for every unit."""


@dataclass(frozen=True)
class Plain:
    """A value that has nothing to do with units; `value` if it is known."""

    value: Any = UNKNOWN


@dataclass(frozen=True)
class Size:
    """A number that depends on how many units there are; `value` with those that there are now."""

    value: Any = UNKNOWN


@dataclass(frozen=True)
class Units:
    """A tensor in which units lie along one dimension, each in an equal range of it.

    Args:
        axis: The dimension, counted from the end, so that it is negative.
        rank: How many dimensions there are, None if that is not known.
        parts: How many parts the dimension has, each with a range of every unit.
    """

    axis: int
    rank: int | None = None
    parts: int = 1

    def at(self, dim: int) -> int:
        """A dimension counted from the end."""
        if dim < 0:
            return dim
        if self.rank is None:
            raise UnreadableError(f"counts dimension {dim} from the front of a tensor of which the rank is not known")
        return dim - self.rank


@dataclass(frozen=True)
class Star:
    """Sizes in a shape of which the number is not known: those of a batch, two of them."""

    value: Any = None


@dataclass(frozen=True)
class Many:
    """Any number of values of one kind."""

    value: Any


def align(values: Sequence[Any]) -> Any:
    """What an operation on each element makes of its operands, which broadcast.

    Raises:
        UnreadableError: If units lie along different dimensions, or a number of units is among them.
    """
    units = [value for value in values if isinstance(value, Units)]
    if any(isinstance(value, Size) for value in values):
        if not units:
            return Size()
        raise UnreadableError("calculates with a number that depends on how many units there are")
    if not units:
        return Plain()
    if len({(value.axis, value.parts) for value in units}) > 1:
        raise UnreadableError("combines tensors in which units lie along different dimensions")
    ranks = [value.rank for value in units if value.rank is not None]
    return replace(units[0], rank=max(ranks) if ranks else None)


def combine(values: Sequence[Any]) -> Any:
    """The same for operands of arithmetic, among which another tensor may be as wide as all units together."""
    found = align(values)
    if isinstance(found, Units) and found.axis == -1:
        if any(isinstance(value, Plain) and value.value is UNKNOWN for value in values):
            raise UnreadableError("combines units with a tensor that may have a value for each of them")
    return found


def reduce(value: Units, dims: Sequence[int], *, keep: bool) -> Units:
    """What is left when dimensions are summed up, or the like."""
    places = [value.at(dim) for dim in dims]
    if value.axis in places or not places:
        raise UnreadableError("goes over the dimension along which the units lie")
    if keep:
        return value
    after = sum(place > value.axis for place in places)
    return replace(value, axis=value.axis + after, rank=None if value.rank is None else value.rank - len(places))


def permute(value: Units, dims: Sequence[int]) -> Units:
    """The dimensions in another order."""
    rank = len(dims)
    places = [dim % rank - rank for dim in dims]
    return replace(value, axis=places.index(value.axis) - rank, rank=rank)


def swap(value: Units, one: int, other: int) -> Units:
    """Two dimensions swapped."""
    places = [value.at(one), value.at(other)]
    if value.axis in places:
        return replace(value, axis=places[1 - places.index(value.axis)])
    return value


def insert(value: Units, dim: int) -> Units:
    """A dimension of size one more."""
    place = dim if dim < 0 else value.at(dim) - 1
    rank = None if value.rank is None else value.rank + 1
    return replace(value, axis=value.axis - (place >= value.axis), rank=rank)


def multiply(left: Any, right: Any) -> Any:
    """A matrix product."""
    units = [value for value in (left, right) if isinstance(value, Units)]
    if not units:
        return align([left, right])
    if len(units) == 1 and isinstance(left, Units) and left.axis == -2 and isinstance(right, Plain):
        return left  # each unit's own values by a matrix
    if any(value.axis > -3 for value in units):
        raise UnreadableError("multiplies matrices along whose rows or columns the units lie")
    return align([left, right])


def reshape(value: Units, sizes: Sequence[Any], heads: set[int]) -> Units:
    """Another shape.

    Args:
        value: The tensor.
        sizes: The sizes asked for.
        heads: The widths that a unit may have.

    Returns:
        Where the units lie then.
    """
    numbers: list[Any] = [getattr(size, "value", None) for size in sizes]
    last, pair = numbers[-1], numbers[-2:]
    rank = sum(2 if isinstance(size, Star) else 1 for size in sizes)
    if value.parts > 1:
        if len(sizes) > 3 and numbers[-3] == value.parts and last in heads:
            return Units(-2, rank)
        raise UnreadableError("reshapes query, key and value, or gate and up, while they are one tensor")
    places = [place - len(sizes) for place, size in enumerate(sizes) if isinstance(size, Size)]
    asked = places or [place - len(sizes) for place, number in enumerate(numbers) if number == -1]
    if value.axis == -1:
        if value.rank == 1 and numbers.count(1) == len(sizes) - 1 and asked:
            return Units(asked[0], rank)
        if -1 in asked:
            if (value.rank is not None and rank > value.rank) or any(type(n) is int and n > 1 for n in numbers[:-1]):
                raise UnreadableError("splits the units' values into groups")
            return replace(value, rank=rank)
        if asked == [-3] and all(type(number) is int for number in pair) and math.prod(pair) in heads:
            return replace(value, axis=-3, rank=rank)
        if asked == [-2] and last in heads:
            return replace(value, axis=-2, rank=rank)
        raise UnreadableError("splits the units' values otherwise than into (..., heads, width of a head)")
    if value.axis == -2:
        if asked == [-2] and (places or last in heads):
            return replace(value, rank=rank)
        if asked in ([-1], []):
            return replace(value, axis=-1, rank=rank)
        raise UnreadableError("joins the units' values in a way that is not known")
    if asked == [value.axis]:
        return replace(value, rank=rank)
    if places == [-3] and value.axis == -4:
        return replace(value, axis=-3, rank=rank)  # key-value heads repeated for their query heads
    raise UnreadableError("reshapes a tensor of heads in a way that is not known")


def flatten(value: Units, begin: int, end: int = -1) -> Units:
    """Dimensions joined."""
    first, last = value.at(begin), value.at(end)
    if value.parts > 1 or not (last < value.axis or first == value.axis):
        if first > value.axis:
            return replace(value, axis=value.axis + last - first, rank=None)
        raise UnreadableError("joins the units with what lies before them")
    joined = last - first
    rank = None if value.rank is None else value.rank - joined
    return replace(value, axis=value.axis + joined if first == value.axis else value.axis, rank=rank)


def glu(value: Any) -> Units:
    """Gate and up, which are one tensor, to their product."""
    if not isinstance(value, Units) or value.parts != 2 or value.axis != -1:
        raise UnreadableError("multiplies one half of the units by the other")
    return replace(value, parts=1)


def take(value: Units, index: Sequence[Any]) -> Any:
    """A part of a tensor.

    Args:
        value: The tensor.
        index: What stands in the brackets: `slice(None)` for all, other slices, None, `...`, or values.

    Returns:
        The part.
    """
    place = list(index).index(Ellipsis) if Ellipsis in index else len(index)
    front, back = index[:place], index[place + 1 :]
    if front and value.rank is None:
        raise UnreadableError("takes a part of a tensor of which the rank is not known")
    taken = sum(entry is not None for entry in (*front, *back))
    length = max(-value.axis, taken) if value.rank is None else value.rank
    entries = [*front, *[slice(None)] * (length - taken), *back]
    place, after, seen = -length, 0, False
    for entry in entries:
        if entry is None:
            after += seen
            continue
        if place == value.axis:
            if entry != slice(None):
                raise UnreadableError("takes some of the units")
            seen = True
        elif isinstance(entry, (Units, Size)):
            raise UnreadableError("takes a part that depends on units")
        elif not isinstance(entry, slice) and seen:
            after -= 1
        place += 1
    dropped = sum(entry is not None and not isinstance(entry, slice) for entry in entries)
    rank = None if value.rank is None else value.rank - dropped + entries.count(None)
    return replace(value, axis=value.axis - after, rank=rank)
