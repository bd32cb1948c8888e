"""From scores and a budget to masks: what a unit is worth over what it costs, channels and heads of all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..compaction import round_up
from ..costs import Costs
from ..structures import Masks, Structure
from .unit_selection import floor_of, multiple_of

_MOST = 0.95
"""The part of its units that a structure may lose."""
_NEAR, _FAR = 0.005, 0.01
"""Parts of a budget: what may stay unused, and what must not for want of blocks that are worth more."""
_SLACK = 1e-9


def find_floors(structures: Sequence[Structure], *, round_to: int, min_heads: int) -> dict[str, int]:
    """The units that each structure keeps at least under a budget.

    Args:
        structures: The structures.
        round_to: Channels that every structure keeps at least.
        min_heads: Heads or key-value groups that every structure keeps at least.

    Returns:
        For each structure's name a number of units: these, and no less than a twentieth of what it has.
    """
    floors = {}
    for structure in structures:
        floor = max(
            floor_of(structure, round_to=round_to, min_heads=min_heads),
            math.ceil((1 - _MOST) * structure.units - _SLACK),
        )
        floors[structure.name] = round_up(floor, multiple_of(structure, round_to), structure.units)
    return floors


def select_within(
    structures: Sequence[Structure],
    scores: Mapping[str, torch.Tensor],
    masks: Masks,
    costs: Costs,
    allowed: float,
    *,
    round_to: int,
    min_heads: int,
) -> dict[str, torch.Tensor]:
    """Choose the units to keep so that a model costs no more than is allowed, and what they are worth is the most.

    The units of every structure go in the order of their scores, in blocks of the multiple. Blocks of all structures
    go in the order of what they are worth over what they cost, until the model costs no more than is allowed; where a
    block costs more than the next one in its structure, as times may, both count as one. Then what still fits comes
    back, the best first.

    Args:
        structures: Structures of both kinds.
        scores: For each structure's name one number per unit, shape `[units]`, of which the sum over units is what
            they are worth together.
        masks: The masks so far, boolean of shape `[units]`, True = keep; what they drop stays dropped.
        costs: What units cost.
        allowed: What the model may cost.
        round_to: Multiple for the number of channels, and how many every structure keeps at least.
        min_heads: Heads or key-value groups that every structure keeps at least.

    Returns:
        The new masks, on the CPU.
    """
    floors = find_floors(structures, round_to=round_to, min_heads=min_heads)
    ladders = [
        _Ladder(s, scores[s.name], masks[s.name], costs, floors[s.name], multiple_of(s, round_to)) for s in structures
    ]
    left = costs.total({ladder.name: ladder.counted[0] for ladder in ladders})
    edges = [(slope, ladder, end) for ladder in ladders for slope, end in ladder.find_edges()]
    for _, ladder, end in sorted(edges, key=lambda edge: edge[0]):
        while ladder.place < end and left > allowed:
            left -= ladder.step(1)
    while back := [ladder for ladder in ladders if ladder.place and ladder.next_cost <= allowed - left]:
        left -= max(back, key=_Ladder.find_worth).step(-1)
    _exchange(ladders, left, allowed)
    return {ladder.name: ladder.make_mask() for ladder in ladders}


def _exchange(ladders: Sequence[_Ladder], left: float, allowed: float) -> None:
    """Bring a block back for smaller ones of other structures, as long as much is unused and that uses more of it.

    Where these are worth more than the block, it comes back only if more than a hundredth is unused.
    """
    while allowed - left > _NEAR * allowed:
        trials = [_try_exchange(ladder, ladders, allowed - left) for ladder in ladders if ladder.place]
        gain, more, places = max(trials, key=lambda trial: trial[0], default=(-math.inf, 0.0, {}))
        if gain == -math.inf or (gain <= 0 and allowed - left <= _FAR * allowed):
            return
        left += more
        for ladder in ladders:
            ladder.place = places.get(ladder.name, ladder.place)


def _try_exchange(back: _Ladder, ladders: Sequence[_Ladder], unused: float) -> tuple[float, float, dict[str, int]]:
    """What it would be worth to bring a block back, what the model would cost more, and the new places."""
    places = {ladder.name: ladder.place for ladder in ladders}
    gain, more = (
        back.worth[back.place - 1] - back.worth[back.place],
        back.costs[back.place - 1] - back.costs[back.place],
    )
    places[back.name] -= 1
    while more > unused:
        rates = [
            ((ladder.worth[place] - ladder.worth[place + 1]) / saved, ladder)
            for ladder in ladders
            if ladder is not back
            and (place := places[ladder.name]) < len(ladder.costs) - 1
            and 0 < (saved := ladder.costs[place] - ladder.costs[place + 1]) < more
        ]
        if not rates:
            return -math.inf, 0.0, {}
        gone = min(rates, key=lambda rate: rate[0])[1]
        place = places[gone.name]
        gain -= gone.worth[place] - gone.worth[place + 1]
        more -= gone.costs[place] - gone.costs[place + 1]
        places[gone.name] += 1
    return gain, more, places


class _Ladder:
    """The sizes that one structure may have, from what it has down to its floor, and where it stands.

    Args:
        structure: The structure.
        scores: A number per unit.
        mask: The units that it has.
        costs: What units cost.
        floor: The fewest units that it may have.
        multiple: What its sizes are multiples of, but for the first.
    """

    def __init__(
        self, structure: Structure, scores: torch.Tensor, mask: torch.Tensor, costs: Costs, floor: int, multiple: int
    ) -> None:
        """See the class."""
        self.name = structure.name
        self.place = 0
        self._units = structure.units
        values = scores.detach().double().cpu()
        self._order = values.masked_fill(~mask.cpu(), -math.inf).argsort(descending=True, stable=True)
        there = int(mask.sum())
        below = range((there - 1) // multiple * multiple, 0, -multiple) if there else ()
        self.sizes = [there, *(size for size in below if size >= floor)]
        self.counted = [round_up(size, multiple, structure.units) for size in self.sizes]
        best = values[self._order[:there]].cumsum(0)
        self.costs = [costs.of(structure.name, size) for size in self.counted]
        self.worth = [float(best[size - 1]) if size else 0.0 for size in self.sizes]

    def find_edges(self) -> list[tuple[float, int]]:
        """The lower hull of what is lost over what is saved: slopes, ascending, and the places where they end."""
        hull = [0]
        for place in range(1, len(self.sizes)):
            if self.costs[place] >= self.costs[hull[-1]] - _SLACK * abs(self.costs[0]):
                continue  # it saves nothing
            while len(hull) > 1 and self._slope(hull[-1], place) <= self._slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(place)
        return [(self._slope(start, end), end) for start, end in zip(hull, hull[1:], strict=False)]

    def step(self, direction: int) -> float:
        """Go down by a block (1) or back up (-1); gives the cost that this saves."""
        before = self.costs[self.place]
        self.place += direction
        return before - self.costs[self.place]

    @property
    def next_cost(self) -> float:
        """What the block would cost that would come back next."""
        return self.costs[self.place - 1] - self.costs[self.place]

    def find_worth(self) -> float:
        """What the block that would come back is worth over what it costs."""
        gain = self.worth[self.place - 1] - self.worth[self.place]
        return gain / self.next_cost if self.next_cost > 0 else math.inf

    def make_mask(self) -> torch.Tensor:
        """The best units, as many as the size says."""
        mask = torch.zeros(self._units, dtype=torch.bool)
        mask[self._order[: self.sizes[self.place]]] = True
        return mask

    def _slope(self, start: int, end: int) -> float:
        return (self.worth[start] - self.worth[end]) / (self.costs[start] - self.costs[end])
