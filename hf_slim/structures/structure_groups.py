"""The structures of a model by their places: one line for all layers where these are alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .structure import Kind, Skipped, Structure

UnitName = Literal["channels", "heads", "key-value groups"]


@dataclass(frozen=True)
class StructureGroup:
    """Structures whose names differ in the numbers of layers alone.

    Args:
        name: Their name, `*` for what differs.
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
    """Modules that are left alone for one reason, and whose names differ in the numbers of layers alone.

    Args:
        name: Their name, `*` for what differs.
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
    groups: dict[object, list[Structure]] = {}
    for s in structures:
        groups.setdefault((_without_numbers(s.name), s.kind, name_unit(s)), []).append(s)
    return tuple(_make_group(found) for found in groups.values())


def group_skipped(skipped: Iterable[Skipped]) -> tuple[SkippedGroup, ...]:
    """Group modules that are left alone by what their names and reasons have in common.

    Args:
        skipped: What was skipped in one model.

    Returns:
        The groups, in the order of their first modules.
    """
    groups: dict[object, list[Skipped]] = {}
    for skip in skipped:
        key = _without_numbers(skip.name), skip.kind, re.sub(r"\d+", "*", skip.reason)
        groups.setdefault(key, []).append(skip)
    return tuple(
        SkippedGroup(_join_names(names := tuple(skip.name for skip in found)), found[0].kind, names, found[0].reason)
        for found in groups.values()
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


def _make_group(found: Sequence[Structure]) -> StructureGroup:
    names = tuple(s.name for s in found)
    return StructureGroup(_join_names(names), found[0].kind, name_unit(found[0]), names, tuple(s.units for s in found))


def _join_names(names: Sequence[str]) -> str:
    """Names of as many parts as one, `*` for the parts that differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(found[0] if len(set(found)) == 1 else "*" for found in parts)


def _without_numbers(name: str) -> str:
    """A name without the parts that are numbers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
