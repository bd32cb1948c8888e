"""What structures cost in time: models of several layer sizes are timed in turn with the dense one."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..compaction import find_pretrained
from ..structures import Structure
from .costs import Costs, Curve
from .flop_costs import Batches
from .latency_table import LatencyTable, make_key
from .skeleton import Kept, Skeleton
from .timing import choose_clock, time_alternately, time_call

_SECONDS, _FEWEST, _MOST = 0.6, 10, 40  # how long one model is timed, and in how many rounds
_POINTS = 4  # sizes that are timed below that of the dense model

Groups = Sequence[Sequence[Structure]]


class Stopwatch:
    """Times models of any sizes in turn with the dense one, and keeps what it has found.

    A busy machine slows both alike, so that what is kept is the dense model's time, once, and for every other model
    its part of it.

    Args:
        skeleton: The dense model.
        batches: The inputs of each transformers model in it.
    """

    def __init__(self, skeleton: Skeleton, batches: Batches) -> None:
        """See the class."""
        self._skeleton = skeleton
        self._batches = batches
        self.table = LatencyTable(make_key(skeleton.model, skeleton.device, batches))

    @property
    def dense(self) -> float:
        """Milliseconds of a forward pass of the dense model."""
        return self.table.find("dense", lambda: self._time({})["dense"])

    def measure(self, kept: Kept) -> float:
        """Milliseconds of a forward pass of a model of some sizes.

        Args:
            kept: How many units the structures have.

        Returns:
            Its part of the time of the dense model, times that one's milliseconds.
        """
        units = {s.name: kept.get(s.name, s.units) for s in self._skeleton.structures}
        dense = self.dense

        def time() -> float:
            times = self._time(units)
            return dense * times["other"] / times["dense"]

        return self.table.find(hashlib.sha256(json.dumps(units).encode()).hexdigest()[:16], time)

    def _time(self, kept: Kept) -> dict[str, float]:
        models = {"dense": self._skeleton.build({})}
        if kept:
            models["other"] = self._skeleton.build(kept)
        for model in models.values():
            model.eval()
        device = self._skeleton.device
        calls = {name: lambda model=model: self._run(model) for name, model in models.items()}
        clock = choose_clock(device)
        with torch.inference_mode():
            calls["dense"]()
            seconds = max(time_call(calls["dense"], device, clock), 1e-6)
            rounds = min(max(int(_SECONDS / seconds), _FEWEST), _MOST)
            times = time_alternately(calls, repeats=rounds, device=device, desc="Times by layer sizes", clock=clock)
        return {name: 1000 * statistics.median(found) for name, found in times.items()}

    def _run(self, model: nn.Module) -> None:
        for part, batch in zip(find_pretrained(model), self._batches, strict=True):
            part(**batch)


def measure_latency_costs(
    stopwatch: Stopwatch, groups: Groups, floors: Mapping[str, int], multiples: Mapping[str, int], asked: float
) -> Costs:
    """Measure what structures cost in time by their sizes.

    All structures of a group are made smaller together, so that a difference stands out; between the sizes lie
    straight lines. A model of about the time that is asked for, all groups smaller by the same part, then shows how
    far the sum is off, and all costs are scaled by that.

    Args:
        stopwatch: What times models.
        groups: Groups of structures that cost the same.
        floors: The fewest units that each structure may have.
        multiples: For each structure of what its number of units has to be a multiple.
        asked: The milliseconds that are asked for.

    Returns:
        The costs.
    """
    dense = stopwatch.dense
    curves: dict[str, Curve] = {}
    for group in groups:
        first = group[0]
        points = {first.units: 0.0}
        for units in _place_points(first, floors[first.name], multiples[first.name]):
            points[units] = (stopwatch.measure(dict.fromkeys((s.name for s in group), units)) - dense) / len(group)
        if len(points) == 1:  # it can lose nothing
            points[0] = 0.0
        curves |= dict.fromkeys((s.name for s in group), Curve.through(points))
    costs = Costs("ms", dense, curves, stopwatch.measure)
    structures = [structure for group in groups for structure in group]
    kept = _find_uniform(costs, structures, floors, multiples, asked)
    saved = dense - costs.total(kept)
    if saved > 0:
        factor = max((dense - stopwatch.measure(kept)) / saved, 0.1)
        curves = {name: curve.scale(factor) for name, curve in curves.items()}
    return Costs("ms", dense, curves, stopwatch.measure)


def _place_points(structure: Structure, floor: int, multiple: int) -> list[int]:
    """Sizes to be timed, spread evenly from the floor on."""
    return sorted({_shrink(structure, floor, multiple, part / _POINTS) for part in range(1, _POINTS + 1)})


def _shrink(structure: Structure, floor: int, multiple: int, part: float) -> int:
    """The size of a structure that has lost a part of what it can lose."""
    wanted = structure.units - part * (structure.units - floor)
    return min(structure.units, max(floor, round(wanted / multiple) * multiple))


def _find_uniform(
    costs: Costs,
    structures: Iterable[Structure],
    floors: Mapping[str, int],
    multiples: Mapping[str, int],
    asked: float,
) -> dict[str, int]:
    """Sizes by which a model would take the time that is asked for, all structures smaller by the same part."""
    kept: dict[str, int] = {}
    for percent in range(0, 101, 2):
        kept = {s.name: _shrink(s, floors[s.name], multiples[s.name], percent / 100) for s in structures}
        if costs.total(kept) <= asked:
            break
    return kept
