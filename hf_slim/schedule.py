"""From the training step to the sparsity."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The pruning steps of one training run and the sparsity that each of them sets.

    Args:
        steps: The optimizer steps (counted from 1) after which units are removed, ascending.
        target: The sparsity that the last of them reaches.
        curve: `exp`, `cubic`, `cos`, `linear` or `oneshot`.
    """

    steps: tuple[int, ...]
    target: float
    curve: str

    def sparsity_at(self, step: int) -> float:
        """The sparsity in force after an optimizer step.

        Args:
            step: Number of optimizer steps done.

        Returns:
            The sparsity, in [0, target]; 0 before the first pruning step, exactly `target` from the last.
        """
        return sparsity_at_event(self.curve, self.events_until(step), len(self.steps), self.target)

    def events_until(self, step: int) -> int:
        """How many pruning steps there are up to an optimizer step.

        Args:
            step: Number of optimizer steps done.

        Returns:
            Their number.
        """
        return bisect.bisect_right(self.steps, step)


def sparsity_at_event(curve: str, event: int, events: int, target: float) -> float:
    """The sparsity that one pruning step sets.

    `cubic` is the curve of Zhu and Gupta 2017 (arXiv:1710.01878); `exp` is 1 - (1 - target)^(i/n).

    Args:
        curve: `exp`, `cubic`, `cos`, `linear` or `oneshot`.
        event: Which pruning step, counted from 1; 0 is before the first.
        events: How many there are.
        target: The sparsity of the last one.

    Returns:
        The sparsity, a fraction in [0, target].

    Raises:
        ValueError: If the curve is unknown.
    """
    if event <= 0:
        return 0.0
    if event >= events:
        return target
    progress = event / events
    if curve == "exp":
        return 1 - (1 - target) ** progress
    if curve == "cubic":
        return target * (1 - (1 - progress) ** 3)
    if curve == "cos":
        return target * (1 - math.cos(math.pi * progress)) / 2
    if curve == "linear":
        return target * progress
    if curve == "oneshot":
        return target
    raise ValueError(f"slim_schedule must be one of exp, cubic, cos, linear, oneshot, got {curve!r}.")


def make_schedule(
    *, start: float, end: float, frequency: float, curve: str, target: float, max_steps: int, begin: int = 0
) -> Schedule:
    """Place the pruning steps in a training run.

    The first is at `start`, then one follows every `frequency` steps, and the last is at `end` exactly. `oneshot`
    removes everything at `start`.

    Args:
        start: First pruning step; 1 or more is a step, below 1 a fraction of the steps after `begin`.
        end: Last pruning step, likewise.
        frequency: Steps between two of them, likewise.
        curve: `exp`, `cubic`, `cos`, `linear` or `oneshot`.
        target: The sparsity to reach, a fraction.
        max_steps: Optimizer steps of the whole training.
        begin: Optimizer steps that were done before slimming begins; what should have happened by then happens at
            the next.

    Returns:
        The schedule.

    Raises:
        ValueError: If the first step is after the last, or the last beyond the end of training.
    """
    first, last = (max(begin + 1, _to_step(value, begin, max_steps)) for value in (start, end))
    if first > last:
        raise ValueError(
            f"slim_start={start} is step {first} of {max_steps}, after slim_end={end}, which is step {last}: "
            "make slim_start smaller or slim_end larger."
        )
    if last > max_steps:
        raise ValueError(
            f"slim_end={end} is beyond the last training step, {max_steps}: the target sparsity would never be "
            "reached. Make slim_end smaller, or train longer."
        )
    if curve == "oneshot":
        return Schedule((first,), target, curve)
    every = max(1, _to_step(frequency, 0, max_steps - begin))
    return Schedule((*range(first, last, every), last), target, curve)


def _to_step(value: float, begin: int, max_steps: int) -> int:
    return int(value) if value >= 1 else begin + round(value * (max_steps - begin))
