"""What a training run is to remove, and when: from a SlimConfig or from auto-slim entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from ..arguments import CriterionName, ScopeName, SlimConfig, place_steps
from ..structures import (
    Discovery,
    Kind,
    Masks,
    Structure,
    exclude_structures,
    find_structures,
    get_tensor,
    has_adapters,
    require_structures,
    total_units,
)
from .auto_slim_config import find_entry_structures, read_entry
from .schedule import Schedule
from .unit_selection import check_reachable


@dataclass(frozen=True)
class Plan:
    """What is to be removed from the structures of one kind.

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


def find_sparsities(structures: Iterable[Structure], masks: Masks) -> dict[str, float]:
    """The sparsities that masks give, by the names of the settings.

    Args:
        structures: The structures in the plans.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

    Returns:
        `ffn2_sparsity` and `mha_sparsity`; 0 where there is no structure of the kind.
    """
    found = {"ffn2_sparsity": 0.0, "mha_sparsity": 0.0}
    structures = list(structures)
    for kind, name in (("ffn", "ffn2_sparsity"), ("mha", "mha_sparsity")):
        planned = [s for s in structures if s.kind == kind]
        if planned:
            found[name] = sum(int((~masks[s.name]).sum()) for s in planned) / total_units(planned)
    return found


def make_plans(
    model: nn.Module,
    config: SlimConfig | Sequence[dict[str, Any]],
    max_steps: int,
    *,
    begin: int = 0,
    steps: Sequence[Sequence[int]] | None = None,
    found: Discovery | None = None,
) -> list[Plan]:
    """Turn the settings into plans for one model and one training run, or refuse them.

    Args:
        model: The model to be trained.
        config: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the training run.
        begin: Optimizer steps done before slimming begins.
        steps: The pruning steps of each plan, where an earlier part of this training has placed them.
        found: What the model has, or had before a training made it smaller; found in it if it is not given.

    Returns:
        A plan for each kind with a target above 0; none if both are 0.

    Raises:
        ValueError: If the settings cannot be carried out on this model in this run.
    """
    found = find_structures(model) if found is None else found
    plans = []
    if isinstance(config, SlimConfig):
        kept = exclude_structures(found.structures, config.slim_exclude or ())
        for kind, sparsity in (("ffn", config.ffn2_sparsity), ("mha", config.mha_sparsity)):
            if sparsity:
                require_structures(model, found, kind)  # type: ignore[arg-type]
                structures = tuple(s for s in kept if s.kind == kind)
                if not structures:
                    raise ValueError(f"slim_exclude={config.slim_exclude} leaves no {kind} structure to slim.")
                plans.append(_make_plan(structures, config, sparsity, max_steps, begin))
    else:
        for entry in config:
            settings, sparsity = read_entry(entry)
            structures = find_entry_structures(found, entry)
            if sparsity and structures:
                plans.append(_make_plan(structures, settings, sparsity, max_steps, begin))
    for plan in plans:
        _require_gradients(model, plan)
    return plans if steps is None else _place_steps(plans, steps, max_steps)


def to_state(config: SlimConfig | Sequence[dict[str, Any]] | None) -> Any:
    """The settings as plain JSON data; `from_state` reads them back."""
    return asdict(config) if isinstance(config, SlimConfig) else config


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


def _place_steps(plans: Sequence[Plan], steps: Sequence[Sequence[int]], max_steps: int) -> list[Plan]:
    if len(steps) != len(plans) or any(placed[-1] > max_steps for placed in steps):
        raise ValueError(
            f"The checkpoint's pruning steps, {[list(placed) for placed in steps]}, do not fit {len(plans)} schedules "
            f"in a training of {max_steps} steps: resume with the number of steps of the run, or more."
        )
    return [
        replace(plan, schedule=replace(plan.schedule, steps=tuple(placed)))
        for plan, placed in zip(plans, steps, strict=True)
    ]


def _make_plan(
    structures: tuple[Structure, ...], config: SlimConfig, sparsity: float, max_steps: int, begin: int
) -> Plan:
    schedule = Schedule(place_steps(config, max_steps, begin=begin), sparsity, config.slim_schedule)
    check_reachable(
        structures, sparsity, scope=config.slim_scope, round_to=config.slim_round_to, min_heads=config.slim_min_heads
    )
    return Plan(
        structures[0].kind,
        structures,
        schedule,
        config.slim_criterion,
        config.slim_scope,
        config.slim_round_to,
        config.slim_min_heads,
    )


def _require_gradients(model: nn.Module, plan: Plan) -> None:
    if plan.criterion == "magnitude":
        return
    for structure in plan.structures:
        for member in structure.outputs:
            if not get_tensor(model, member.tensor).requires_grad:
                later = " Or slim first, and add the adapters to the slim model." if has_adapters(model) else ""
                raise ValueError(
                    f"{member.tensor} is frozen, so slim_criterion={plan.criterion!r} cannot score {structure.name}: "
                    f"train it, exclude it with slim_exclude, or use slim_criterion='magnitude'.{later}"
                )
