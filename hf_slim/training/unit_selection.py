"""From scores and a target sparsity to masks: scope, floors, rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..arguments import ScopeName
from ..compaction import round_up
from ..structures import Structure, total_units

_SLACK = 1e-9
"""Against 0.29 * 100 = 28.999999999999996."""


def select_units(
    structures: Sequence[Structure],
    scores: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    scope: ScopeName,
    round_to: int,
    min_heads: int,
) -> dict[str, torch.Tensor]:
    """Choose the units to keep: the most important ones, of those still there.

    Units dropped before stay dropped. Every structure of channels keeps a multiple of `round_to`, so a little less
    than the sparsity asks for may be removed: less than one multiple from each structure with `local`, and from all
    together with `global`, which ranks blocks of that many channels by their mean score.

    Args:
        structures: Structures of one kind.
        scores: For each structure's name one number per unit, shape `[units]`.
        masks: The masks so far, boolean of shape `[units]`, True = keep.
        sparsity: Fraction of all units to drop, which passed `check_reachable`.
        scope: `local` drops that fraction in each structure, `global` the lowest scores over all of them.
        round_to: Multiple for the number of channels, and how many every structure keeps at least.
        min_heads: Heads or key-value groups that every structure keeps at least.

    Returns:
        The new masks, on the CPU.
    """
    ranked = {
        s.name: scores[s.name].detach().double().cpu().masked_fill(~masks[s.name].cpu(), -math.inf) for s in structures
    }
    if scope == "local":
        keep = {s.name: s.units - _count(sparsity, s.units) for s in structures}
    else:
        keep = _rank_globally(structures, ranked, sparsity, round_to=round_to, min_heads=min_heads)
    chosen = {}
    for structure in structures:
        number = round_up(keep[structure.name], multiple_of(structure, round_to), structure.units)
        number = min(number, int(masks[structure.name].sum()))
        mask = torch.zeros(structure.units, dtype=torch.bool)
        mask[ranked[structure.name].argsort(descending=True, stable=True)[:number]] = True
        chosen[structure.name] = mask
    return chosen


def check_reachable(
    structures: Sequence[Structure], sparsity: float, *, scope: ScopeName, round_to: int, min_heads: int
) -> None:
    """Refuse a sparsity that the floors make impossible.

    Args:
        structures: Structures of one kind.
        sparsity: Fraction of their units to drop.
        scope: `local` or `global`.
        round_to: Channels that every structure keeps at least.
        min_heads: Heads or key-value groups that every structure keeps at least.

    Raises:
        ValueError: If it is unreachable; the message says what is reachable and which floor is in the way.
    """
    floors = {s.name: floor_of(s, round_to=round_to, min_heads=min_heads) for s in structures}
    group = structures
    if scope == "local":
        group = [min(structures, key=lambda s: (s.units - floors[s.name]) / s.units)]
    units, floor = total_units(group), sum(floors[s.name] for s in group)
    if sparsity == 0 or (units > floor and _count(sparsity, units) <= units - floor):
        return
    argument, setting, value = ("mha_sparsity", "slim_min_heads", min_heads)
    if group[0].kind == "ffn":
        argument, setting, value = ("ffn2_sparsity", "slim_round_to", round_to)
    where = f"of the {units} units of {group[0].name if scope == 'local' else f'{len(group)} structures'}"
    raise ValueError(
        f"{argument}={sparsity} is unreachable: {where}, {setting}={value} keeps at least {floor}, so "
        f"{(units - floor) / units:.4g} is the most. Lower {argument} or {setting}."
    )


def floor_of(structure: Structure, *, round_to: int, min_heads: int) -> int:
    """The units that a structure keeps at least: `round_to` channels or `min_heads` heads, if it has so many."""
    return min(structure.units, multiple_of(structure, round_to) if structure.kind == "ffn" else min_heads)


def multiple_of(structure: Structure, round_to: int) -> int:
    """What the number of units of a structure has to be a multiple of: for channels, heads are not rounded."""
    return math.lcm(round_to, structure.multiple) if structure.kind == "ffn" else 1


def _count(sparsity: float, units: int) -> int:
    return math.floor(sparsity * units + _SLACK)


def _rank_globally(
    structures: Sequence[Structure],
    ranked: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    round_to: int,
    min_heads: int,
) -> dict[str, int]:
    """How many units each structure keeps: its best ones in blocks of the multiple, the best blocks of all."""
    blocks = []
    for structure in structures:
        multiple = multiple_of(structure, round_to)
        floor = floor_of(structure, round_to=round_to, min_heads=min_heads)
        for start, block in enumerate(ranked[structure.name].sort(descending=True).values.split(multiple)):
            alive = block[block > -math.inf]
            value = (
                math.inf if start * multiple < floor else float(alive.sum()) / len(block) if len(alive) else -math.inf
            )
            blocks.append((value, structure.name, len(block), len(alive)))
    blocks.sort(key=lambda block: block[0], reverse=True)
    units = total_units(structures)
    wanted = units - _count(sparsity, units)
    keep = {s.name: 0 for s in structures}
    left = 0
    for _, name, size, alive in blocks:
        if left >= wanted:
            break
        keep[name] += size
        left += alive
    return keep
