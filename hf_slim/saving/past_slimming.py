"""What a model carries of how it was slimmed before it is saved: by `slim`, or before it was loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..compaction import DenseModel, find_pretrained
from ..costs import BudgetReport, Costs, count_parameter_costs
from ..structures import join
from .layer_bars import StructureSize
from .report import SLIM_ALREADY, SlimReport, count_parameters
from .saved_report import REPORT, read_report

_KEPT_AS = "_hf_slim_past"
"""Attribute of a model that was slimmed; a copy of the model has it, too."""
_COSTS = ("flops_before", "flops_after", "milliseconds_before", "milliseconds_after", "machine", "missing")
_Pairs = Sequence[tuple[StructureSize, StructureSize]]
"""Structures as the loaded report says them, each with what it is in the report of today."""


@dataclass(frozen=True)
class PastSlimming:
    """How a model was slimmed. Which units it has lost in this process stands on its modules.

    Args:
        settings: The arguments of the last slimming, by name.
        budget: What was asked for by a budget then, and what came of it.
        parameters: Those that the model had then.
        loaded: What an earlier process made of the model, if it was loaded from a folder that says so.
        base_model: What that was made from, by its name on the Hub.
        has_record: Whether the config that was loaded has a shape record, which says what left since it was stock.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: BudgetReport | None = None
    parameters: int | None = None
    loaded: SlimReport | None = None
    base_model: str | None = None
    has_record: bool = False


def keep_slimming(model: nn.Module, settings: Mapping[str, Any], budget: BudgetReport | None) -> None:
    """Keep with a model how it was slimmed.

    Args:
        model: The slimmed model.
        settings: The arguments, by name.
        budget: What was asked for by a budget, and what came of it.
    """
    past = find_past(model)[1]
    vars(model)[_KEPT_AS] = replace(past, settings=settings, budget=budget, parameters=count_parameters(model))


def keep_loaded(model: nn.Module, source: Any) -> None:
    """Keep with a model that has been loaded what `save_slimmed` left beside it.

    Args:
        model: The model.
        source: What it was loaded from: a folder, or anything else.
    """
    if not isinstance(source, (str, os.PathLike)) or not Path(source, REPORT).is_file():
        return
    try:
        saved = read_report(Path(source))
    except ValueError:  # a model loads whatever lies beside it
        return
    past = PastSlimming(loaded=saved.report, has_record=saved.facts.needs_import)
    if count_parameters(model) == saved.report.parameters_after:  # else another head, or weights saved over those
        past = replace(
            past,
            settings=saved.facts.provenance.settings,
            budget=saved.report.budget,
            parameters=saved.report.parameters_after,
            base_model=saved.facts.base_model,
        )
    vars(model)[_KEPT_AS] = past


def find_past(model: nn.Module) -> tuple[str, PastSlimming]:
    """Find how a model was slimmed, or the only transformers model in it.

    Args:
        model: The model.

    Returns:
        The dotted name of what was slimmed, and how; nothing is known of a model that was not.
    """
    parts = find_pretrained(model)
    for slimmed in (model, *(parts if len(parts) == 1 else ())):
        past = vars(slimmed).get(_KEPT_AS)
        if isinstance(past, PastSlimming):
            return next(path for path, module in model.named_modules() if module is slimmed), past
    return "", PastSlimming()


def count_past_costs(model: nn.Module, dense: DenseModel) -> Costs | None:
    """Count what the units of a model cost, where some may have left it before it was loaded.

    Args:
        model: The model, before it is slimmed.
        dense: What it was when it was loaded or built.

    Returns:
        The parameters of its structures; None if no report was loaded with it.
    """
    loaded = find_past(model)[1].loaded
    return None if loaded is None else count_parameter_costs(dense.model, dense.structures, {})


def add_past(report: SlimReport, model: nn.Module, costs: Costs | None) -> SlimReport:
    """Add to a report what the model has behind it.

    Args:
        report: What has become of the model since it was built or loaded.
        model: The slim model.
        costs: What `count_past_costs` gave for it.

    Returns:
        The report: with the sizes from before an earlier process made it smaller, and with a budget that the model
            still has. Where it cannot be told what the model was, it says so.
    """
    path, past = find_past(model)
    if report.budget is None and past.parameters == count_parameters(model.get_submodule(path)):
        report = replace(report, budget=past.budget)
    first = past.loaded
    if first is None or costs is None:
        return report
    now = {size.name: size for size in report.structures}
    names = _match_names(first, now, path, model.get_submodule(path))
    unproven = (names[name] for name in first.unproven if names.get(name) in now)
    report = replace(report, unproven=tuple(dict.fromkeys((*report.unproven, *unproven))))
    pairs = [(size, now[names[size.name]]) for size in first.structures if names[size.name] in now]
    if SLIM_ALREADY in first.missing:
        report = _say_slim(report)
    knows_all = all(then.before == size.before for then, size in pairs)
    if first.parameters_before == first.parameters_after or (past.has_record and pairs and knows_all):
        return report
    lost = _count_lost(first, report, pairs, costs) if len(pairs) == len(first.structures) else None
    if lost is None:
        return _say_slim(report)
    if knows_all:  # the dense model, saved over a slim one
        return report
    befores = {size.name: then.before for then, size in pairs}
    per_parameter = (first.bytes_before - first.bytes_after) / (first.parameters_before - first.parameters_after)
    return replace(
        report,
        parameters_before=report.parameters_before + lost,
        bytes_before=report.bytes_before + round(lost * per_parameter * _find_scale(first, report)),
        structures=tuple(replace(s, before=befores.get(s.name, s.before)) for s in report.structures),
        **_join_costs(first, report, pairs),
    )


def _match_names(first: SlimReport, now: Collection[str], path: str, model: nn.Module) -> dict[str, str]:
    """What the structures of the loaded report are called by now: around a model, or with another head or none."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    old = [size.name for size in first.structures]
    matches = [
        {name: join(around, change(name)) for name in old}
        for around in dict.fromkeys(("", path))
        for change in (str, lambda name: name.removeprefix(base), lambda name: base.lstrip(".") + name)
    ]
    return max(matches, key=lambda match: sum(name in now for name in match.values()))


def _count_lost(first: SlimReport, report: SlimReport, pairs: _Pairs, costs: Costs) -> int | None:
    """How many parameters the model had lost that the report does not count; None if that cannot be told.

    It can if the units of today are those of the loaded report: their numbers fit, and they cost what it says.
    """
    said = first.parameters_before - first.parameters_after
    if report.parameters_before == first.parameters_after and all(then.after == size.before for then, size in pairs):
        return said
    for then, size in pairs:
        is_between = then.after < size.before < then.before and size.after <= then.after
        if then.kind != size.kind or not (size.before in (then.before, then.after) or is_between):
            return None
    if said != round(sum(costs.of(size.name, then.before) - costs.of(size.name, then.after) for then, size in pairs)):
        return None
    return round(sum(costs.of(size.name, then.before) - costs.of(size.name, size.before) for then, size in pairs))


def _say_slim(report: SlimReport) -> SlimReport:
    """The report, which says that it does not begin with the dense model."""
    if SLIM_ALREADY in report.missing:
        return report
    return replace(report, missing=f"{report.missing} {SLIM_ALREADY}".strip())


def _find_scale(first: SlimReport, report: SlimReport) -> float:
    """How many times as many bytes a parameter has by now."""
    if report.parameters_before == first.parameters_after:
        return report.bytes_before / first.bytes_after
    now, then = report.bytes_before / report.parameters_before, first.bytes_after / first.parameters_after
    return max(1, round(now)) / max(1, round(then))


def _join_costs(first: SlimReport, report: SlimReport, pairs: _Pairs) -> dict[str, Any]:
    """The costs from before the first slimming to after the last one."""
    is_as_loaded = all(then.after == size.after for then, size in pairs)
    if is_as_loaded and report.parameters_after == first.parameters_after:
        return {name: getattr(first, name) for name in _COSTS}
    what = "latency"
    flops: tuple[int | None, int | None] = (first.flops_before, report.flops_after)
    if first.flops_before is None or first.flops_after != report.flops_before:
        what, flops = "operations and latency", (None, None)
    why = f"The {what} of the model before is not known: it was smaller already when it was loaded."
    why = f"{why} {SLIM_ALREADY}" if SLIM_ALREADY in first.missing else why
    return dict(zip(_COSTS, (*flops, None, None, "", why), strict=True))
