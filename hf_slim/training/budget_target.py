"""A target that is a budget: one for channels and heads of all layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.utils import logging

from ..arguments import BUDGET_CRITERION, Budget, CriterionName, ScopeName, SlimConfig
from ..compaction import find_pretrained, has_record
from ..costs import BudgetReport, Costs, Kept, find_costs
from ..parallel import run_in_first_process
from ..structures import Masks, Structure
from .budget_selection import find_floors, select_within
from .schedule import Schedule
from .unit_selection import multiple_of

logger = logging.get_logger(__name__)

_CLOSE = 0.02
"""How far from what was asked a measured time may be."""
_TRIES = 4
_LEAST = 0.25
"""What part of what the curves promise is taken to be saved at least: less has been measured wrong."""


@dataclass(frozen=True)
class BudgetTarget:
    """What is to be removed from structures of both kinds, so that a model costs no more than a budget.

    Args:
        structures: The structures.
        schedule: When which part of the dense model's cost is removed.
        budget: What was asked for.
        costs: What units cost.
        round_to: Multiple for the number of channels.
        min_heads: Heads that every structure keeps at least.
        criterion: The importance score, which has to add up.
    """

    structures: tuple[Structure, ...]
    schedule: Schedule
    budget: Budget
    costs: Costs
    round_to: int
    min_heads: int
    criterion: CriterionName = BUDGET_CRITERION

    @property
    def scope(self) -> ScopeName:
        """Layers are ranked together."""
        return "global"

    @property
    def asked(self) -> float:
        """What the model may cost."""
        return self.budget.amount(self.costs.dense)

    def select(self, scores: Mapping[str, torch.Tensor], masks: Masks, step: int) -> dict[str, torch.Tensor]:
        """Choose the units to keep at a pruning step; every process has to call this.

        Where costs are times, a model of the sizes that are chosen is timed, and the choice corrected by that: what is
        dropped once never comes back.

        Args:
            scores: For each structure's name one number per unit, shape `[units]`, of which the sum over units is what
                they are worth together.
            masks: The masks so far, True = keep; what they drop stays dropped.
            step: The optimizer step, counted from 1.

        Returns:
            The new masks of the structures, on the CPU.
        """
        is_last = step >= self.schedule.steps[-1]
        allowed = self.asked if is_last else self.costs.dense * (1 - self.schedule.sparsity_at(step))
        chosen = self._select(scores, masks, allowed)
        if self.costs.measure is None:
            return chosen
        return self._correct(chosen, scores, masks, allowed, tries=_TRIES if is_last else 2)

    def report(self, kept: Kept) -> BudgetReport:
        """What was asked for, and what a model of some sizes has.

        Args:
            kept: For each structure's name how many units it has.
        """
        return BudgetReport(self.budget.unit, self.costs.dense, self.asked, self.costs.find(kept))

    def _select(self, scores: Mapping[str, torch.Tensor], masks: Masks, allowed: float) -> dict[str, torch.Tensor]:
        return select_within(
            self.structures,
            scores,
            masks,
            self.costs,
            allowed,
            round_to=self.round_to,
            min_heads=self.min_heads,
        )

    def _correct(
        self,
        chosen: dict[str, torch.Tensor],
        scores: Mapping[str, torch.Tensor],
        masks: Masks,
        allowed: float,
        tries: int,
    ) -> dict[str, torch.Tensor]:
        """Of several choices that whose measured cost is nearest to what is allowed."""
        aim, best, nearest = allowed, chosen, float("inf")
        for _ in range(tries):
            kept = {name: int(mask.sum()) for name, mask in chosen.items()}
            got = run_in_first_process(partial(self.costs.find, kept))
            if abs(got / allowed - 1) < nearest:
                best, nearest = chosen, abs(got / allowed - 1)
            if nearest <= _CLOSE:
                break
            saved = self.costs.dense - self.costs.total(kept)
            factor = max((self.costs.dense - got) / saved, _LEAST) if saved > 0 else 1.0
            aim = self.costs.dense - (self.costs.dense - allowed) / factor
            chosen = self._select(scores, masks, aim)
        return best


def make_budget_target(
    model: nn.Module,
    structures: Sequence[Structure],
    config: SlimConfig,
    budget: Budget,
    steps: tuple[int, ...],
    *,
    found: Sequence[Structure],
    sizes: Mapping[str, torch.Size],
) -> BudgetTarget:
    """Find what units cost, and refuse a budget that cannot be met; every process has to call this.

    Args:
        model: The model; units may have left it while it trained.
        structures: The structures that are to lose units.
        config: The settings.
        budget: What they ask for.
        steps: The pruning steps.
        found: All structures of the dense model.
        sizes: For tensors from which units have left the sizes that they had.

    Returns:
        The target.

    Raises:
        ValueError: If the dense model has no more than that, or the floors keep more; the message says what is
            reachable.
    """
    round_to, min_heads = config.slim_round_to, config.slim_min_heads
    floors = find_floors(structures, round_to=round_to, min_heads=min_heads)
    multiples = {s.name: multiple_of(s, round_to) for s in structures}
    costs = find_costs(model, budget, structures, found=found, sizes=sizes, floors=floors, multiples=multiples)
    asked, least = budget.amount(costs.dense), costs.total(floors)
    spec = ".3f" if budget.unit == "ms" else ",.0f"
    if asked >= costs.dense:
        raise ValueError(
            f"{budget.field}={budget.value:{spec}} asks for no less than the model has, "
            f"{costs.dense:{spec}} {budget.unit}: make it smaller."
        )
    if asked < least:
        raise ValueError(
            f"{budget.field}={getattr(config, budget.field)} is unreachable: with slim_round_to={round_to}, "
            f"slim_min_heads={min_heads} and a twentieth of every layer kept, {least:{spec}} {budget.unit}, "
            f"{least / costs.dense:.4g} of the {costs.dense:{spec}} that the model has, is the least. Raise it, or "
            "lower slim_round_to or slim_min_heads."
        )
    if budget.is_fraction and not sizes and _is_slim(model):
        logger.warning(
            f"{budget.field}={getattr(config, budget.field)} is taken of what the model has now, {costs.dense:{spec}} "
            f"{budget.unit}, so {asked:{spec}} are asked for: its config says that layers have sizes of their own, as "
            "after an earlier slimming. For a fraction of the model that it was made from, give a number."
        )
    schedule = Schedule(steps, 1 - asked / costs.dense, config.slim_schedule)
    return BudgetTarget(tuple(structures), schedule, budget, costs, round_to, min_heads)


def _is_slim(model: nn.Module) -> bool:
    configs = [part.config for part in find_pretrained(model)]
    return any(has_record(config) or bool(config.to_dict().get("per_layer_config")) for config in configs)
