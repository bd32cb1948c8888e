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
