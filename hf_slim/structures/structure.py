"""Coupled layers that shrink together, and the index arithmetic of their units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import LongTensor, nn


class UnaccountedError(ValueError):
    """A module matches a layout, but something in it is not explained by the layout."""


Kind = Literal["ffn", "mha"]
Role = Literal["output", "input", "extra", "norm", "adapter"]


@dataclass(frozen=True, eq=False)
class Member:
    """One tensor of a structure and the positions that each unit owns in it.

    Args:
        tensor: Dotted name of the parameter or buffer.
        dim: The dimension along which the units lie.
        index: Positions along `dim`, shape `[units, k]`.
        role: `output` for the weight that reads the units (FFN2, output projection), `input` for the weights that
            make them, `norm` for the weight of an RMS norm over all units together, `adapter` for what an adapter
            beside an `output` reads of the units, `extra` for what else belongs to a unit (biases, relative-position
            tables, what an adapter adds to an `input`).
    """

    tensor: str
    dim: int
    index: LongTensor
    role: Role

    def sum_units(self, values: torch.Tensor) -> torch.Tensor:
        """Add up what belongs to each unit, without waiting for the device.

        Args:
            values: A number for each position along the member's dimension.

        Returns:
            The sums, shape `[units]`, on the same device.
        """
        units, size = self.index.shape
        if self._begin is not None:
            own = values.narrow(0, self._begin, units * size)
            return own if size == 1 else own.view(units, size).sum(1)
        if values.device not in self._moved:
            self._moved[values.device] = self.index.to(values.device)
        taken = values.index_select(0, self._moved[values.device].flatten())
        return taken.view(units, size).sum(1)

    @cached_property
    def _begin(self) -> int | None:
        """The first position, if all units together own a range, each a part of it in their order."""
        flat = self.index.flatten()
        is_range = bool((flat == torch.arange(len(flat), device="cpu") + flat[0]).all())
        return int(flat[0]) if is_range else None

    @cached_property
    def _moved(self) -> dict[torch.device, torch.Tensor]:
        """The index on the devices that asked for it."""
        return {}


@dataclass(frozen=True)
class Count:
    """A module attribute that depends on the number of units.

    Args:
        module: Dotted name of the module.
        attribute: Name of the attribute, `config.` before it where the module reads it from its config.
        per_unit: Its value for one unit.
        inverse: Whether its value is `per_unit` divided by the number of units (the epsilon of an RMS norm) instead of
            multiplied with it.
    """

    module: str
    attribute: str
    per_unit: float
    inverse: bool = False

    def value(self, units: int) -> float:
        """The attribute's value for a number of units."""
        return self.per_unit / units if self.inverse else self.per_unit * units


class Explained(NamedTuple):
    """What a layout explains of a module.

    Args:
        names: Paths of the children and tensors that it explains.
        members: What of them belongs to units.
        counts: The attributes that depend on the number of units.
    """

    names: tuple[str, ...]
    members: Sequence[Member] = ()
    counts: Sequence[Count] = ()


@dataclass(frozen=True, eq=False)
class Structure:
    """Coupled layers that shrink together.

    Args:
        name: Dotted name of the second layer (FFN2 or output projection), `*` where it spans several blocks.
        kind: `ffn`, whose unit is an intermediate channel, or `mha`, whose unit is an attention head or, with
            grouped-query attention, a key-value group.
        units: How many units it has.
        members: The tensors that it touches.
        counts: The module attributes that count its units.
        reshaping: Dotted names of the modules whose code has to infer the width of the heads' outputs.
        multiple: The number of units has to be a multiple of this, where units are removed at all.
    """

    name: str
    kind: Kind
    units: int
    members: tuple[Member, ...]
    counts: tuple[Count, ...] = ()
    reshaping: tuple[str, ...] = ()
    multiple: int = 1

    @property
    def outputs(self) -> tuple[Member, ...]:
        """The members that read the units: the FFN2 columns or those of the output projection."""
        return tuple(m for m in self.members if m.role == "output")

    @property
    def deciders(self) -> tuple[Member, ...]:
        """The members that must be zero for a unit to contribute nothing.

        That is its columns in the output, those of adapters included; with a norm over all units also what makes it,
        since a unit that is zero only behind the norm still changes the mean of the squares.
        """
        if any(m.role == "norm" for m in self.members):
            return tuple(m for m in self.members if m.role != "norm")
        return tuple(m for m in self.members if m.role in ("output", "adapter"))

    def positions(self, units: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
        """Where units lie in the tensors.

        Args:
            units: Boolean, shape `[units]`; True for the units asked for.

        Returns:
            For each (tensor, dimension) of the members the ascending positions, int64.
        """
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        for member in self.members:
            found.setdefault((member.tensor, member.dim), []).append(member.index[units].flatten())
        return {place: torch.cat(parts).sort().values for place, parts in found.items()}

    def keep(self, units: torch.Tensor, numbers: Mapping[tuple[str, int], torch.Tensor]) -> Structure:
        """What the structure is after some of its units have been removed.

        Args:
            units: Boolean, shape `[units]`; True for the units that are left.
            numbers: For each (tensor, dimension) from which positions were removed the new number of each old one.

        Returns:
            The structure with the units that are left, in the same order.
        """

        def renumber(member: Member) -> Member:
            index: Any = member.index[units]
            if (member.tensor, member.dim) in numbers:
                index = numbers[member.tensor, member.dim][index]
            return replace(member, index=index)

        return replace(self, units=int(units.sum()), members=tuple(renumber(member) for member in self.members))

    def rename(self, change: Callable[[str], str]) -> Structure:
        """The structure with other names, as seen from another module.

        Args:
            change: From the name of a tensor or of a module to its new name.

        Returns:
            The same structure otherwise.
        """
        return replace(
            self,
            name=change(self.name),
            members=tuple(replace(m, tensor=change(m.tensor)) for m in self.members),
            counts=tuple(replace(c, module=change(c.module)) for c in self.counts),
            reshaping=tuple(map(change, self.reshaping)),
        )


Masks = Mapping[str, torch.Tensor]
"""For each structure's name a boolean tensor of shape `[units]`, True = keep."""


@dataclass(frozen=True)
class Skipped:
    """A module that looked like attention or a feed-forward network and is left alone.

    Args:
        name: Dotted name of the module.
        kind: `ffn` or `mha`.
        reason: Why.
        is_hooked: Whether it is for a hook of somebody's own, without which it may be no more than another one.
    """

    name: str
    kind: Kind
    reason: str
    is_hooked: bool = False


@dataclass(frozen=True)
class Discovery:
    """What `find_structures` found in a model.

    Args:
        structures: What can be slimmed, in the order of the model's modules.
        skipped: What looked like it and is left alone, with the reason.
    """

    structures: tuple[Structure, ...]
    skipped: tuple[Skipped, ...] = field(default=())

    @classmethod
    def of(cls, found: Iterable[Structure | Skipped]) -> Discovery:
        """What was found or skipped, one after the other."""
        parts = list(found)
        return cls(
            tuple(s for s in parts if isinstance(s, Structure)), tuple(s for s in parts if isinstance(s, Skipped))
        )

    def __str__(self) -> str:
        """A readable summary, a line for each structure and each skipped module."""
        lines = [f"{len(self.structures)} structures"]
        lines += [f"  {s.kind}  {s.name}: {s.units} units" for s in self.structures]
        if self.skipped:
            lines.append(f"{len(self.skipped)} skipped")
            lines += [f"  {s.kind}  {s.name}: {s.reason}" for s in self.skipped]
        return "\n".join(lines)

    def of_kind(self, kind: Kind) -> tuple[Structure, ...]:
        """The structures of one kind."""
        return tuple(s for s in self.structures if s.kind == kind)


def blocks(count: int, size: int, start: int = 0) -> LongTensor:
    """The index of units that own consecutive ranges.

    Args:
        count: Number of units.
        size: Positions of each.
        start: Position at which the first begins.

    Returns:
        int64 tensor of shape `[count, size]`.
    """
    index = torch.arange(count * size, device="cpu").view(count, size) + start
    return index  # type: ignore[return-value]


def spread(units: int, positions: int, copies: int, start: int = 0) -> LongTensor:
    """The index of units that own a consecutive range in each of several equal parts.

    Args:
        units: Number of units.
        positions: How many positions all parts have together.
        copies: Number of parts.
        start: Position at which the first begins.

    Returns:
        int64 tensor of shape `[units, positions / units]`.

    Raises:
        UnaccountedError: If they cannot share the positions equally.
    """
    if positions % (units * copies):
        raise UnaccountedError(f"{units} units in {copies} parts cannot share {positions} positions equally")
    part = positions // copies
    index = torch.cat([blocks(units, part // units, start + copy * part) for copy in range(copies)], dim=1)
    return index  # type: ignore[return-value]


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of that dotted name.

    Args:
        model: Any module.
        name: For example `encoder.layer.0.output.dense.weight`.

    Returns:
        The tensor itself.
    """
    path, _, leaf = name.rpartition(".")
    return getattr(get_module(model, path), leaf)


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name; faster than `get_submodule`, which counts where a model has many.

    Args:
        model: Any module.
        name: For example `encoder.layer.0.output.dense`, or nothing for the module itself.

    Returns:
        The module.
    """
    found: Any = model
    for child in name.split(".") if name else ():
        found = found._modules[child]
    return found


def count_left(model: nn.Module, structure: Structure) -> int:
    """How many units of one of its structures a model has left.

    Args:
        model: The model, made smaller since the structure was found in it.
        structure: The structure as it was.

    Returns:
        The number of units.
    """
    output = structure.outputs[0]
    return get_tensor(model, output.tensor).shape[output.dim] // output.index.shape[1]


def total_units(structures: Iterable[Structure]) -> int:
    """The number of units of several structures together."""
    return sum(s.units for s in structures)
