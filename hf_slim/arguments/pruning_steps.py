"""Where the pruning steps of a training lie."""

from __future__ import annotations

from typing import Any


def place_steps(values: Any, max_steps: int, *, begin: int = 0) -> tuple[int, ...]:
    """Place the pruning steps in a training run.

    The first is at `slim_start`, then one follows every `slim_frequency` steps, and the last is at `slim_end` exactly.
    `oneshot` removes everything at `slim_start`. Fractions are of the steps after `begin`.

    Args:
        values: What has the slimming fields.
        max_steps: Optimizer steps of the whole training.
        begin: Optimizer steps that were done before slimming begins; what should have happened by then happens at
            the next.

    Returns:
        The optimizer steps (counted from 1) after which units are removed, ascending.

    Raises:
        ValueError: If the first step is after the last, or the last beyond the end of training.
    """
    start, end = values.slim_start, values.slim_end
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
    if values.slim_schedule == "oneshot":
        return (first,)
    return (*range(first, last, max(1, _to_step(values.slim_frequency, 0, max_steps - begin))), last)


def _to_step(value: float, begin: int, max_steps: int) -> int:
    return int(value) if value >= 1 else begin + round(value * (max_steps - begin))
