"""The structures of a model by their places: one line for all layers where these are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .structure import Kind, Skipped, Structure

UnitName = Literal["channels", "heads", "key-value groups"]


@dataclass(frozen=True)
class StructureGroup:
    """Structures whose names differ in numbers alone.

    Args:
        name: What their names have in common, `*` for every number; the name itself of one alone.
        kind: `ffn` or `mha`.
        unit: What is counted.
        names: Their names, in the order of the model's modules.
        units: How many units each has.
    """

    name: str
    kind: Kind
    unit: UnitName
    names: tuple[str, ...]
    units: tuple[int, ...]

    def __str__(self) -> str:
        """The number of units: one where all have as many, else one for each."""
        return f"{self.units[0]:,}" if len(set(self.units)) == 1 else " ".join(map(str, self.units))

    @property
    def range(self) -> str:
        """The number of units: one where all have as many, else the least and the largest."""
        return name_range(self.units)


@dataclass(frozen=True)
class SkippedGroup:
    """Modules that are left alone for one reason, and whose names differ in numbers alone.

    Args:
        name: What their names have in common, `*` for every number; the name itself of one alone.
        kind: `ffn` or `mha`.
        names: Their names.
        reason: Why the first is left alone.
    """

    name: str
    kind: Kind
    names: tuple[str, ...]
    reason: str


def group_by_place(structures: Iterable[Structure]) -> tuple[StructureGroup, ...]:
    """Group structures by what their names have in common.

    Args:
        structures: Structures of one model.

    Returns:
        The groups, in the order of their first structures.
    """
    groups: dict[tuple[str, Kind, UnitName], list[Structure]] = {}
    for s in structures:
        groups.setdefault((_without_numbers(s.name), s.kind, name_unit(s)), []).append(s)
    return tuple(
        StructureGroup(
            name if len(found) > 1 else found[0].name,
            kind,
            unit,
            tuple(s.name for s in found),
            tuple(s.units for s in found),
        )
        for (name, kind, unit), found in groups.items()
    )


def group_skipped(skipped: Iterable[Skipped]) -> tuple[SkippedGroup, ...]:
    """Group modules that are left alone by what their names and reasons have in common.

    Args:
        skipped: What was skipped in one model.

    Returns:
        The groups, in the order of their first modules.
    """
    groups: dict[tuple[str, Kind, str], list[Skipped]] = {}
    for skip in skipped:
        key = _without_numbers(skip.name), skip.kind, _without_numbers(skip.reason)
        groups.setdefault(key, []).append(skip)
    return tuple(
        SkippedGroup(
            name if len(found) > 1 else found[0].name, kind, tuple(skip.name for skip in found), found[0].reason
        )
        for (name, kind, _), found in groups.items()
    )


def name_range(numbers: Iterable[int]) -> str:
    """One number where all are the same, else the least and the largest.

    Args:
        numbers: The numbers.

    Returns:
        For example `64` or `32 to 64`; nothing for no numbers.
    """
    found = sorted(set(numbers))
    return " to ".join(f"{number:,}" for number in (*found[:1], *found[1:][-1:]))


def name_unit(structure: Structure) -> UnitName:
    """What the units of a structure are called.

    Of a key-value group the output projection reads more than a third of what query, key and value make together.

    Args:
        structure: The structure.

    Returns:
        The name, in the plural.
    """
    if structure.kind == "ffn":
        return "channels"
    read = structure.outputs[0].index.shape[1]
    made = sum(m.index.shape[1] for m in structure.members if m.role == "input") // len(structure.outputs)
    return "key-value groups" if read < made < 3 * read else "heads"


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
