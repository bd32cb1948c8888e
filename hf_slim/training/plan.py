"""What a training is to remove, and when: the settings, checked against the model and the run, and frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..arguments import CriterionName, LiveChoice, ScopeName, SlimConfig, place_steps, read_budget
from ..costs import BudgetReport, Kept
from ..structures import (
    Discovery,
    Kind,
    Masks,
    Structure,
    exclude_structures,
    get_tensor,
    has_adapters,
    require_structures,
    total_units,
)
from .auto_slim_entries import find_entry_structures, read_entry
from .budget_target import BudgetTarget, make_budget_target
from .schedule import Schedule
from .unit_selection import check_reachable, select_units

logger = logging.get_logger(__name__)

Settings = SlimConfig | Sequence[dict[str, Any]]
"""A `SlimConfig`, or the list that `parse_auto_slim_config` returned."""


@dataclass(frozen=True)
class Target:
    """What is to be removed from some structures of one kind.

    Args:
        kind: `ffn` or `mha`.
        structures: The structures.
        schedule: When how much is removed.
        criterion: The importance score.
        scope: `global` or `local`.
        round_to: Multiple for the number of channels.
        min_heads: Heads that every structure keeps at least.
    """

    kind: Kind
    structures: tuple[Structure, ...]
    schedule: Schedule
    criterion: CriterionName
    scope: ScopeName
    round_to: int
    min_heads: int

    def select(self, scores: Mapping[str, torch.Tensor], masks: Masks, step: int) -> dict[str, torch.Tensor]:
        """Choose the units to keep at a pruning step.

        Args:
            scores: For each structure's name one number per unit, shape `[units]`; the lowest go first.
            masks: The masks so far, True = keep; what they drop stays dropped.
            step: The optimizer step, counted from 1.

        Returns:
            The new masks of the structures, on the CPU.
        """
        return select_units(
            self.structures,
            scores,
            masks,
            self.schedule.sparsity_at(step),
            scope=self.scope,
            round_to=self.round_to,
            min_heads=self.min_heads,
        )


@dataclass(frozen=True)
class Plan:
    """What a training is to remove, and when.

    Args:
        targets: One for each kind with a sparsity above 0, or for each auto-slim entry; or that of a budget.
        live: Whether dropped units are to leave the model while it trains.
        round_to: Multiple that the number of channels is rounded up to where the model is saved.
        settings: What was asked for, as plain JSON data.
    """

    targets: tuple[Target | BudgetTarget, ...]
    live: LiveChoice
    round_to: int
    settings: Any

    @property
    def structures(self) -> list[Structure]:
        """The structures of all targets."""
        return [structure for target in self.targets for structure in target.structures]

    @property
    def last_step(self) -> int:
        """The optimizer step at which the target sparsity is reached; 0 if there is nothing to do."""
        return max((target.schedule.steps[-1] for target in self.targets), default=0)

    @property
    def budget(self) -> BudgetTarget | None:
        """The target of a budget, if one was asked for."""
        return next((target for target in self.targets if isinstance(target, BudgetTarget)), None)

    def report_budget(self, kept: Kept) -> BudgetReport | None:
        """What was asked for by a budget, and what a model has with so many units; None if none was."""
        return None if self.budget is None else self.budget.report({s.name: kept[s.name] for s in self.structures})

    def find_sparsities(self, masks: Masks) -> dict[str, float]:
        """The sparsities that masks give, by the names of the settings.

        Args:
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

        Returns:
            `ffn2_sparsity` and `mha_sparsity`; 0 where no structure of the kind is planned.
        """
        found = {"ffn2_sparsity": 0.0, "mha_sparsity": 0.0}
        for kind, name in (("ffn", "ffn2_sparsity"), ("mha", "mha_sparsity")):
            planned = [s for s in self.structures if s.kind == kind]
            if planned:
                found[name] = sum(int((~masks[s.name]).sum()) for s in planned) / total_units(planned)
        return found


def make_plan(
    model: nn.Module,
    settings: Settings,
    max_steps: int,
    *,
    found: Discovery,
    begin: int = 0,
    steps: Sequence[Sequence[int]] | None = None,
    sizes: Mapping[str, torch.Size] | None = None,
) -> Plan:
    """Turn the settings into a plan for one model and one training, or refuse them.

    Args:
        model: The model to be trained.
        settings: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the training.
        found: What the model has, or had before a training made it smaller.
        begin: Optimizer steps done before slimming begins.
        steps: The pruning steps of each target, where an earlier part of this training has placed them.
        sizes: For tensors that a training has made smaller the sizes that they had.

    Returns:
        The plan; without targets if all sparsities are 0 and there is no budget.

    Raises:
        ValueError: If the settings cannot be carried out on this model in this training.
    """
    targets: tuple[Target | BudgetTarget, ...]
    if isinstance(settings, SlimConfig):
        round_to = settings.slim_round_to
        targets = tuple(_make_target(*wish, max_steps, begin) for wish in _read_config(model, settings, found))
        targets += tuple(_read_budget(model, settings, found, max_steps, begin, sizes or {}))
    else:
        round_to = SlimConfig().slim_round_to
        targets = tuple(_make_target(*wish, max_steps, begin) for wish in _read_entries(settings, found))
    if steps is not None:
        targets = _place_steps(targets, steps, max_steps)
    _warn_of_hooks(targets, found)
    return Plan(targets, find_live_choice(settings), round_to, to_state(settings))


def require_gradients(model: nn.Module, plan: Plan) -> None:
    """Refuse to score what has no gradients.

    Args:
        model: The model to be trained.
        plan: What is to be removed.

    Raises:
        ValueError: If a weight that a score needs the gradient of is frozen.
    """
    for target in plan.targets:
        if target.criterion != "magnitude":
            for structure in target.structures:
                _require_gradients(model, structure, target.criterion, is_budget=isinstance(target, BudgetTarget))


def find_live_choice(settings: Settings) -> LiveChoice:
    """Whether dropped units are to leave the model while it trains; with auto-slim entries they stay as zeros."""
    return settings.slim_live if isinstance(settings, SlimConfig) else False


def to_state(settings: Settings | None) -> Any:
    """The settings as plain JSON data; `from_state` reads them back."""
    return asdict(settings) if isinstance(settings, SlimConfig) else settings


def from_state(state: Any) -> SlimConfig | list[dict[str, Any]] | None:
    """Settings as `SlimTrainerCallback` takes them, or from what `to_state` wrote.

    Args:
        state: A `SlimConfig`, its fields in a dict, the list that `parse_auto_slim_config` returned, or None.

    Returns:
        The settings, checked.

    Raises:
        ValueError: If it is something else, or a value is out of range.
    """
    if state is None or isinstance(state, SlimConfig):
        return state
    if isinstance(state, dict):
        known = [f.name for f in fields(SlimConfig)]
        unknown = [key for key in state if key not in known]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not a field of SlimConfig; its fields are {', '.join(known)}. Entries of "
                "parse_auto_slim_config go into a list."
            )
        return SlimConfig(**state)
    if not isinstance(state, (list, tuple)):
        raise ValueError(
            "SlimTrainerCallback takes a SlimConfig, the list that parse_auto_slim_config returns, or nothing (then "
            f"it reads the fields of the training arguments), got {type(state).__name__}."
        )
    for entry in state:
        read_entry(entry)
    names = [name for entry in state for name in set(entry["op_names"])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"op_names: {', '.join(twice)} is in more than one entry; name each layer once.")
    return list(state)


_Wish = tuple[tuple[Structure, ...], SlimConfig, float]
"""Structures, the settings for them, and the sparsity to reach."""


def _read_config(model: nn.Module, config: SlimConfig, found: Discovery) -> Iterator[_Wish]:
    kept = exclude_structures(found.structures, config.slim_exclude or ())
    sparsities: dict[Kind, float] = {"ffn": config.ffn2_sparsity, "mha": config.mha_sparsity}
    for kind, sparsity in sparsities.items():
        if sparsity:
            require_structures(model, found, kind)
            structures = tuple(s for s in kept if s.kind == kind)
            if not structures:
                raise ValueError(f"slim_exclude={config.slim_exclude} leaves no {kind} structure to slim.")
            yield structures, config, sparsity


def _read_budget(
    model: nn.Module,
    config: SlimConfig,
    found: Discovery,
    max_steps: int,
    begin: int,
    sizes: Mapping[str, torch.Size],
) -> Iterator[BudgetTarget]:
    budget = read_budget(config)
    if budget is not None:
        require_structures(model, found)
        structures = exclude_structures(found.structures, config.slim_exclude or ())
        if not structures:
            raise ValueError(f"slim_exclude={config.slim_exclude} leaves no structure to slim.")
        steps = place_steps(config, max_steps, begin=begin)
        yield make_budget_target(model, structures, config, budget, steps, found=found.structures, sizes=sizes)


def _warn_of_hooks(targets: Iterable[Target | BudgetTarget], found: Discovery) -> None:
    kinds = {structure.kind for target in targets for structure in target.structures}
    hooked = [f"{skip.name}, since {skip.reason}" for skip in found.skipped if skip.is_hooked and skip.kind in kinds]
    if hooked:
        logger.warning(
            f"Not slimmed, so that what was asked for is removed from the other modules alone: {'; '.join(hooked)}."
        )


def _read_entries(entries: Iterable[dict[str, Any]], found: Discovery) -> Iterator[_Wish]:
    for entry in entries:
        config, sparsity = read_entry(entry)
        structures = find_entry_structures(found, entry)
        if sparsity and structures:
            yield structures, config, sparsity


def _make_target(
    structures: tuple[Structure, ...], config: SlimConfig, sparsity: float, max_steps: int, begin: int
) -> Target:
    schedule = Schedule(place_steps(config, max_steps, begin=begin), sparsity, config.slim_schedule)
    scope, round_to, min_heads = config.slim_scope, config.slim_round_to, config.slim_min_heads
    check_reachable(structures, sparsity, scope=scope, round_to=round_to, min_heads=min_heads)
    return Target(structures[0].kind, structures, schedule, config.slim_criterion, scope, round_to, min_heads)


def _place_steps(
    targets: Sequence[Target | BudgetTarget], steps: Sequence[Sequence[int]], max_steps: int
) -> tuple[Target | BudgetTarget, ...]:
    if len(steps) != len(targets) or any(placed[-1] > max_steps for placed in steps):
        raise ValueError(
            f"The checkpoint's pruning steps, {[list(placed) for placed in steps]}, do not fit {len(targets)} "
            f"schedules in a training of {max_steps} steps: resume with the number of steps of the run, or more."
        )
    return tuple(
        replace(target, schedule=replace(target.schedule, steps=tuple(placed)))
        for target, placed in zip(targets, steps, strict=True)
    )


def _require_gradients(model: nn.Module, structure: Structure, criterion: CriterionName, *, is_budget: bool) -> None:
    for member in structure.outputs:
        if not get_tensor(model, member.tensor).requires_grad:
            later = " Or slim first, and add the adapters to the slim model." if has_adapters(model) else ""
            other = "sparsities and slim_criterion='magnitude'" if is_budget else "slim_criterion='magnitude'"
            raise ValueError(
                f"{member.tensor} is frozen, so {'a budget' if is_budget else f'slim_criterion={criterion!r}'} cannot "
                f"score {structure.name}: train it, exclude it with slim_exclude, or use {other}.{later}"
            )
