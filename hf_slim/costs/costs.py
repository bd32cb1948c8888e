"""What a model costs by the number of units that its structures have."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from .skeleton import Kept


@dataclass(frozen=True)
class Curve:
    """What a structure costs by its number of units: straight lines between points that are known.

    Args:
        units: Numbers of units, ascending, two at least.
        costs: What so many cost, never less than fewer do.
    """

    units: tuple[int, ...]
    costs: tuple[float, ...]

    @classmethod
    def through(cls, points: Mapping[int, float]) -> Curve:
        """A curve through points, of which some may be wrong so that more units cost less."""
        units = sorted(points)
        return cls(tuple(units), tuple(accumulate((points[number] for number in units), max)))

    def at(self, units: int) -> float:
        """The cost of a number of units; what is beyond the points lies on the first or the last line."""
        end = min(max(bisect.bisect_left(self.units, units), 1), len(self.units) - 1)
        (left, right), (low, high) = self.units[end - 1 : end + 1], self.costs[end - 1 : end + 1]
        return low + (high - low) * (units - left) / (right - left)

    def scale(self, factor: float) -> Curve:
        """The same curve, all costs multiplied."""
        return Curve(self.units, tuple(cost * factor for cost in self.costs))


@dataclass(frozen=True)
class Costs:
    """What a model costs: so much when it is dense, and less by what each structure has lost.

    Args:
        unit: `parameters`, `FLOPs` or `ms`.
        dense: What the dense model costs.
        curves: For each structure's name what it costs by its number of units.
        measure: Finds what a model of some sizes really costs, where the curves do not say it exactly.
    """

    unit: str
    dense: float
    curves: Mapping[str, Curve]
    measure: Callable[[Kept], float] | None = None

    def of(self, name: str, units: int) -> float:
        """What a structure costs with a number of units."""
        return self.curves[name].at(units)

    def total(self, kept: Kept) -> float:
        """What a model of some sizes costs by the curves."""
        full = {name: curve.units[-1] for name, curve in self.curves.items()}
        return self.dense - sum(
            curve.at(full[name]) - curve.at(kept.get(name, full[name])) for name, curve in self.curves.items()
        )

    def find(self, kept: Kept) -> float:
        """What a model of some sizes costs, measured where the curves do not say it exactly."""
        return self.total(kept) if self.measure is None else self.measure(kept)


@dataclass(frozen=True)
class BudgetReport:
    """What was asked for by a budget, and what came of it.

    Args:
        unit: `parameters`, `FLOPs` or `ms`.
        dense: What the model had before: what a fraction is of.
        asked: What the slim model was to have at most.
        got: What it has.
    """

    unit: str
    dense: float
    asked: float
    got: float

    def __str__(self) -> str:
        """One line."""
        spec = ",.3f" if self.unit == "ms" else ",.0f"
        asked, got, dense = (format(value, spec) for value in (self.asked, self.got, self.dense))
        return (
            f"{asked} {self.unit} asked ({self._share(self.asked)}), {got} got ({self._share(self.got)}) "
            f"of {dense} before"
        )

    def _share(self, value: float) -> str:
        return f"{100 * value / self.dense:.1f}%"
