"""Sizes that lose the same fraction everywhere: what a slim model would be, before any unit has a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..compaction import round_up
from ..costs import Costs
from ..structures import Kind, Structure
from .unit_selection import floor_of, multiple_of

_SLACK = 1e-9
_STEPS = 1000


def size_evenly(
    structures: Sequence[Structure], sparsities: Mapping[Kind, float], *, round_to: int, min_heads: int
) -> dict[str, int]:
    """What structures keep of their units if all of a kind lose the same fraction, or as much as the floors allow.

    Args:
        structures: The structures.
        sparsities: For each kind the fraction to remove; nothing of a kind that is not named.
        round_to: Multiple for the number of channels, and how many every structure keeps at least.
        min_heads: Heads or key-value groups that every structure keeps at least.

    Returns:
        For each structure's name a number of units.
    """
    kept = {}
    for s in structures:
        floor = max(1, floor_of(s, round_to=round_to, min_heads=min_heads))
        left = s.units - math.floor(sparsities.get(s.kind, 0.0) * s.units + _SLACK)
        kept[s.name] = round_up(max(left, floor), multiple_of(s, round_to), s.units)
    return kept


def fit_evenly(
    structures: Sequence[Structure], costs: Costs, asked: float, *, round_to: int, min_heads: int
) -> tuple[float, dict[str, int]]:
    """The smallest fraction by which all structures meet a budget, if they lose the same.

    A training to a budget ranks the units of all layers and of both kinds, so that it ends with other sizes of the
    same cost.

    Args:
        structures: The structures of both kinds.
        costs: What units cost.
        asked: What the model may cost; no less than what the floors keep.
        round_to: Multiple for the number of channels, and how many every structure keeps at least.
        min_heads: Heads or key-value groups that every structure keeps at least.

    Returns:
        The fraction, to a thousandth, and for each structure's name a number of units.
    """

    def size(step: int) -> dict[str, int]:
        sparsities: dict[Kind, float] = {"ffn": step / _STEPS, "mha": step / _STEPS}
        return size_evenly(structures, sparsities, round_to=round_to, min_heads=min_heads)

    low, high = 0, _STEPS
    while low < high:
        middle = (low + high) // 2
        if costs.total(size(middle)) <= asked:
            high = middle
        else:
            low = middle + 1
    return low / _STEPS, size(low)
