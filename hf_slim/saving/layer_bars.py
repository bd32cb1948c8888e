"""What a picture of the layers shows: a bar for what each structure keeps, in a panel for each kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..structures import Kind

_GAP = 1.2
"""Bars' widths between two groups."""
_LABELS = 16
"""The most numbers below one panel."""
_SLOTS = 12
"""A panel has room for so many bars at least: a few are no wider than many."""
BAR = 0.78
"""The width of a bar, where that with the space beside it is 1."""

INK = "#7a828c"
"""Text and axes of a picture: readable on a light page and on a dark one."""
COLORS: dict[Kind, str] = {"ffn": "#3b82d6", "mha": "#d9772b"}
"""The bars of the kinds, likewise."""


class Outline(NamedTuple):
    """How opaque the outline of what there was is, inside and at its edge."""

    fill: float
    edge: float


OUTLINE = Outline(0.1, 0.8)
"""In the colour of the text."""
TITLES: dict[Kind, str] = {
    "ffn": "feed-forward networks: intermediate channels",
    "mha": "attention: heads or key-value groups",
}
"""What the panels of the kinds are called."""


@dataclass(frozen=True)
class StructureSize:
    """The size of one structure before and after.

    Args:
        name: Dotted name of the structure.
        kind: `ffn` or `mha`.
        before: Units that it had.
        after: Units that are left.
    """

    name: str
    kind: Kind
    before: int
    after: int


class Bar(NamedTuple):
    """What a structure had and keeps, and where it stands, in widths of a bar."""

    x: float
    before: int
    after: int


class Group(NamedTuple):
    """Bars of structures whose names differ in numbers only: from where to where, and what sets them apart."""

    start: float
    end: float
    label: str


class Panel(NamedTuple):
    """All structures of one kind.

    Args:
        kind: `ffn` or `mha`.
        bars: A bar for each structure, in the order of the model's modules in each group.
        groups: The groups; their labels are empty where there is only one.
        ticks: Positions of bars with the number of the layer.
        kept: Units kept, all together.
        total: Units that there were.
    """

    kind: Kind
    bars: tuple[Bar, ...]
    groups: tuple[Group, ...]
    ticks: tuple[tuple[float, str], ...]
    kept: int
    total: int

    @property
    def title(self) -> str:
        """The kind, and how much of it is kept."""
        return f"{TITLES[self.kind]} ({self.kept:,} of {self.total:,} kept, {self.kept / self.total:.0%})"

    @property
    def start(self) -> float:
        """Where the panel begins, in widths of a bar."""
        return self.bars[0].x - 0.5

    @property
    def end(self) -> float:
        """Where it ends."""
        return max(self.bars[-1].x + 0.5, self.start + _SLOTS)

    @property
    def line(self) -> float:
        """How thick the outlines are, in pixels of a picture as wide as a README: thinner around narrow bars."""
        return min(0.8, 24 / len(self.bars))

    @property
    def highest(self) -> int:
        """The most units that a structure had."""
        return max(bar.before for bar in self.bars)

    @property
    def scale(self) -> list[int]:
        """The numbers of units to be named beside the bars."""
        return sorted({0, self.highest // 2, self.highest})


def lay_out_bars(structures: Sequence[StructureSize]) -> list[Panel]:
    """Lay out the bars of a model.

    Args:
        structures: The sizes, in the order of the model's modules.

    Returns:
        A panel for each kind of which there are structures.
    """
    kinds: tuple[Kind, ...] = ("ffn", "mha")
    sizes = {kind: [size for size in structures if size.kind == kind] for kind in kinds}
    return [_lay_out(kind, found) for kind, found in sizes.items() if found]


def _lay_out(kind: Kind, sizes: Sequence[StructureSize]) -> Panel:
    groups: dict[str, list[StructureSize]] = {}
    for size in sizes:
        groups.setdefault(re.sub(r"\d+", "*", size.name), []).append(size)
    labels = _find_labels(list(groups))
    bars: list[Bar] = []
    places: list[Group] = []
    ticks: list[tuple[float, str]] = []
    every = -(-len(sizes) // _LABELS)
    x = 0.0
    for (pattern, members), label in zip(groups.items(), labels, strict=True):
        start = x
        for number, size in enumerate(members):
            bars.append(Bar(x, size.before, size.after))
            if number % every == 0:
                ticks.append((x, _find_number(pattern, members, number)))
            x += 1
        places.append(Group(start, x - 1, label))
        x += _GAP
    kept, total = sum(size.after for size in sizes), sum(size.before for size in sizes)
    return Panel(kind, tuple(bars), tuple(places), tuple(ticks), kept, total)


def _find_labels(patterns: Sequence[str]) -> list[str]:
    """For each pattern the parts of the name that not all of them have."""
    parts = [pattern.split(".") for pattern in patterns]
    common = set(parts[0]).intersection(*parts[1:])
    return [".".join(part for part in own if part not in common) for own in parts]


def _find_number(pattern: str, members: Sequence[StructureSize], number: int) -> str:
    """The first number in the name that is not the same in all names of the group."""
    numbers = [re.findall(r"\d+", size.name) for size in members]
    columns = zip(numbers[number], *numbers, strict=True)
    return next((own for own, *others in columns if len({*others}) > 1), str(number))
