"""What a training run is to remove, and when: from a SlimConfig or from auto-slim entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from .adapters import has_adapters
from .arguments import CriterionName, ScopeName, SlimConfig
from .auto_slim import PATTERNS, find_entry_structures
from .discovery import exclude_structures, find_structures, require_structures
from .schedule import Schedule, make_schedule
from .selection import check_reachable
from .structures import Kind, Structure, get_tensor

_ENTRY_FIELDS = {
    "start_step": "slim_start",
    "end_step": "slim_end",
    "pruning_frequency": "slim_frequency",
    "pruning_scope": "slim_scope",
    "sparsity_decay_type": "slim_schedule",
    "pruning_type": "slim_criterion",
}
_ENTRY_DEFAULTS = SlimConfig(slim_criterion="snip_momentum", slim_schedule="exp", slim_round_to=1)


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


def make_plans(model: nn.Module, config: SlimConfig | Sequence[dict[str, Any]], max_steps: int) -> list[Plan]:
    """Turn the settings into plans for one model and one training run, or refuse them.

    Args:
        model: The model to be trained.
        config: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the training run.

    Returns:
        A plan for each kind with a target above 0; none if both are 0.

    Raises:
        ValueError: If the settings cannot be carried out on this model in this run.
    """
    found = find_structures(model)
    plans = []
    if isinstance(config, SlimConfig):
        kept = exclude_structures(found.structures, config.slim_exclude or ())
        for kind, sparsity in (("ffn", config.ffn2_sparsity), ("mha", config.mha_sparsity)):
            if sparsity:
                require_structures(model, found, kind)  # type: ignore[arg-type]
                structures = tuple(s for s in kept if s.kind == kind)
                if not structures:
                    raise ValueError(f"slim_exclude={config.slim_exclude} leaves no {kind} structure to slim.")
                plans.append(_make_plan(structures, config, sparsity, max_steps))
    else:
        for entry in config:
            settings, sparsity = _read_entry(entry)
            structures = find_entry_structures(found, entry)
            if sparsity and structures:
                plans.append(_make_plan(structures, settings, sparsity, max_steps))
    names = [s.name for plan in plans for s in plan.structures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"op_names: {', '.join(twice)} is in more than one entry; name each layer once.")
    for plan in plans:
        _require_gradients(model, plan)
    return plans


def to_state(config: SlimConfig | Sequence[dict[str, Any]] | None) -> Any:
    """The settings as plain JSON data; `from_state` reads them back."""
    return asdict(config) if isinstance(config, SlimConfig) else config


def from_state(state: Any) -> SlimConfig | list[dict[str, Any]] | None:
    """Settings from what `to_state` wrote."""
    return SlimConfig(**state) if isinstance(state, dict) else state


def _make_plan(structures: tuple[Structure, ...], config: SlimConfig, sparsity: float, max_steps: int) -> Plan:
    schedule = make_schedule(
        start=config.slim_start,
        end=config.slim_end,
        frequency=config.slim_frequency,
        curve=config.slim_schedule,
        target=sparsity,
        max_steps=max_steps,
    )
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


def _read_entry(entry: dict[str, Any]) -> tuple[SlimConfig, float]:
    known = {"op_names", "pattern", "target_sparsity", *_ENTRY_FIELDS}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"{unknown[0]} is not known in an auto-slim entry; known are {', '.join(sorted(known))}.")
    missing = sorted({"op_names", "pattern", "target_sparsity"} - set(entry))
    if missing:
        raise ValueError(f"An auto-slim entry lacks {missing[0]}; take the entries from parse_auto_slim_config.")
    if entry["pattern"] not in PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {entry['pattern']!r}.")
    changes = {field: entry[key] for key, field in _ENTRY_FIELDS.items() if key in entry}
    if changes.get("slim_schedule") == "cube":
        changes["slim_schedule"] = "cubic"
    sparsity_field = {"ffn": "ffn2_sparsity", "mha": "mha_sparsity"}[PATTERNS[entry["pattern"]]]
    return replace(_ENTRY_DEFAULTS, **changes, **{sparsity_field: entry["target_sparsity"]}), entry["target_sparsity"]


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
