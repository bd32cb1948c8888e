"""What a model carries of how it was slimmed before it is saved: by `slim`, or before it was loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..compaction import find_pretrained
from ..costs import BudgetReport
from ..structures import join
from .report import SlimReport, count_parameters
from .saved_report import REPORT, read_report

_KEPT_AS = "_hf_slim_past"
"""Attribute of a model that was slimmed; a copy of the model has it, too."""
_COSTS = ("flops_before", "flops_after", "milliseconds_before", "milliseconds_after", "machine", "missing")


@dataclass(frozen=True)
class PastSlimming:
    """How a model was slimmed. Which units it has lost in this process stands on its modules.

    Args:
        settings: The arguments of the last slimming, by name.
        budget: What was asked for by a budget then, and what came of it.
        parameters: Those that the model had then.
        loaded: What an earlier process made of the model, if it was loaded from a folder that says so.
        base_model: What that was made from, by its name on the Hub.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: BudgetReport | None = None
    parameters: int | None = None
    loaded: SlimReport | None = None
    base_model: str | None = None


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
    if count_parameters(model) == saved.report.parameters_after:
        vars(model)[_KEPT_AS] = PastSlimming(
            saved.facts.provenance.settings,
            saved.report.budget,
            saved.report.parameters_after,
            saved.report,
            saved.facts.base_model,
        )


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


def add_past(report: SlimReport, model: nn.Module) -> SlimReport:
    """Add to a report what the model has behind it.

    Args:
        report: What has become of the model since it was built or loaded.
        model: The slim model.

    Returns:
        The report: with the sizes from before an earlier process made it smaller, and with a budget that the model
            still has.
    """
    path, past = find_past(model)
    if report.budget is None and past.parameters == count_parameters(model.get_submodule(path)):
        report = replace(report, budget=past.budget)
    if past.loaded is None:
        return report
    first, now = past.loaded, {size.name: size for size in report.structures}
    names = {size.name: size.name if size.name in now else join(path, size.name) for size in first.structures}
    unproven = (names[name] for name in first.unproven if names.get(name) in now)
    report = replace(report, unproven=tuple(dict.fromkeys((*report.unproven, *unproven))))
    sizes = {names[size.name]: size for size in first.structures}
    if any(name not in now or now[name].before != size.after for name, size in sizes.items()):
        return report  # its config still says what it was before, or it is another model by now
    scale = report.bytes_before / first.bytes_after if report.parameters_before == first.parameters_after else 1
    return replace(
        report,
        parameters_before=report.parameters_before + first.parameters_before - first.parameters_after,
        bytes_before=report.bytes_before + round((first.bytes_before - first.bytes_after) * scale),
        structures=tuple(replace(s, before=sizes.get(s.name, s).before) for s in report.structures),
        **_join_costs(first, report),
    )


def _join_costs(first: SlimReport, report: SlimReport) -> dict[str, Any]:
    """The costs from before the first slimming to after the last one."""
    if all(size.before == size.after for size in report.structures):
        return {name: getattr(first, name) for name in _COSTS}
    what = "latency"
    flops: tuple[int | None, int | None] = (first.flops_before, report.flops_after)
    if first.flops_before is None or first.flops_after != report.flops_before:
        what, flops = "operations and latency", (None, None)
    why = f"The {what} of the model before is not known: it was smaller already when it was loaded."
    return dict(zip(_COSTS, (*flops, None, None, "", why), strict=True))
