"""find_costs: what the units of a model cost in what a budget is counted in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..arguments import Budget
from ..parallel import is_spread, run_in_first_process
from ..structures import Structure
from .costs import Costs
from .flop_costs import count_flop_costs, count_flops, group_structures, make_batches
from .latency_costs import Stopwatch, measure_latency_costs
from .parameter_costs import count_parameter_costs
from .skeleton import Skeleton


def find_costs(
    model: nn.Module,
    budget: Budget,
    structures: Sequence[Structure],
    *,
    found: Sequence[Structure],
    sizes: Mapping[str, torch.Size],
    floors: Mapping[str, int],
    multiples: Mapping[str, int],
) -> Costs:
    """Find what the units of structures cost; every process has to call this.

    Args:
        model: The model; units may have left it while it trained.
        budget: What is counted.
        structures: The structures that are to lose units.
        found: All structures of the dense model.
        sizes: For tensors from which units have left the sizes that they had.
        floors: For each structure the fewest units that it may have.
        multiples: For each structure of what its number of units has to be a multiple.

    Returns:
        The costs.

    Raises:
        ValueError: If the forward pass of the model cannot be counted or timed.
    """
    if budget.unit == "parameters":
        return count_parameter_costs(model, structures, sizes)
    if is_spread(model):
        raise ValueError(
            f"{budget.field} cannot be used where each process holds only a part of the weights, since a copy of the "
            "model is run by itself: use slim_target_params."
        )
    skeleton = Skeleton(model, found, sizes)
    batches = make_batches(model, budget.field)
    if budget.unit == "FLOPs":
        return count_flop_costs(skeleton, structures, batches, count_flops(skeleton, batches, {}))
    stopwatch = Stopwatch(skeleton, batches)

    def measure() -> tuple[float, dict]:
        groups = group_structures(skeleton, structures, count_flops(skeleton, batches, {}))
        asked = budget.amount(stopwatch.dense)
        costs = measure_latency_costs(stopwatch, groups, floors, multiples, asked)
        return costs.dense, dict(costs.curves)

    dense, curves = run_in_first_process(measure)
    return Costs("ms", dense, curves, stopwatch.measure)
