"""`hf-slim inspect`: what can be slimmed in a model and what would be left, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..arguments import SlimConfig, find_asked, read_budget
from ..compaction import Form, cut_copy, find_form
from ..costs import (
    Costs,
    Kept,
    ModelPart,
    Skeleton,
    count_flop_costs,
    count_flops,
    count_parameter_costs,
    count_parts,
    make_batches,
    write_out,
)
from ..exports import WayOut, find_ways_out
from ..proof import RUN_ERRORS, describe
from ..saving import render_table, shorten
from ..structures import (
    Discovery,
    Kind,
    SkippedGroup,
    Structure,
    StructureGroup,
    exclude_structures,
    find_structures,
    group_by_place,
    group_skipped,
    name_range,
)
from ..training import fit_evenly, make_plan, multiple_of, size_evenly
from .model_source import build_without_weights, load_config

_SPARSITIES = (0.25, 0.5, 0.75, 0.9)
_TYPICAL = "0.5 of all"
_STEPS = 1000
"""Of a training, which settings are checked against; what is removed does not depend on it."""


@dataclass
class InspectArguments:
    """Which model is looked at, and how much of it is to go.

    Args:
        model: A Hub name, a folder, or a .json file with a config; no weights are read.
        ffn2_sparsity: The settings of the same names, as of `SlimConfig`; so are all that follow.
    """

    model: str
    ffn2_sparsity: float = SlimConfig.ffn2_sparsity
    mha_sparsity: float = SlimConfig.mha_sparsity
    slim_target_params: float | str | None = None
    slim_target_flops: float | str | None = None
    slim_round_to: int = SlimConfig.slim_round_to
    slim_min_heads: int = SlimConfig.slim_min_heads
    slim_exclude: list[str] | None = None

    def to_settings(self) -> SlimConfig:
        """The settings, checked."""
        return SlimConfig(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "model"})


@dataclass(frozen=True)
class SlimSize:
    """What a model would be at some sparsity, if all layers lose the same.

    Args:
        asked: What was asked for.
        units: For each structure's name how many units it keeps.
        parameters: Parameters of the model.
        flops: Operations of a forward pass; None where they cannot be counted.
    """

    asked: str
    units: dict[str, int]
    parameters: int
    flops: int | None


@dataclass(frozen=True)
class SlimResult:
    """In what form a slim model is saved, and what takes it.

    Args:
        scope: `as it is`; `local`, where all layers lose the same; `local, channels alone`, where only that gives a
            stock model; `global`, where layers are ranked together and end with different sizes.
        form: Where its sizes stand; None where its shape cannot be recorded.
        ways: What takes it.
    """

    scope: str
    form: Form | None
    ways: tuple[WayOut, ...]


@dataclass(frozen=True)
class Inspection:
    """What can be slimmed in a model and what would be left; prints as tables.

    Args:
        model: What the config was loaded from.
        architecture: The class of the model.
        form: In what form the sizes stand in the config that was looked at.
        structures: What can be slimmed.
        skipped: What is left alone, and why.
        parts: Where parameters and operations are.
        counted_on: The inputs of the forward pass whose operations are counted, or why they are not.
        sizes: What would be left: first the model as it is, then what was asked for, or some sparsities.
        results: What comes of it by `slim_scope`; empty where nothing can be slimmed.
    """

    model: str
    architecture: str
    form: Form
    structures: tuple[StructureGroup, ...]
    skipped: tuple[SkippedGroup, ...]
    parts: tuple[ModelPart, ...]
    counted_on: str
    sizes: tuple[SlimSize, ...]
    results: tuple[SlimResult, ...]

    def __str__(self) -> str:
        """The tables, one after the other."""
        slim = {"stock": "", "record": ", slim by its record", "per_layer_config": ", layers by per_layer_config"}
        tables = [f"{self.architecture} from {self.model}{slim[self.form]}", self._render_parts()]
        if self.structures:
            tables.append(self._render_structures())
        tables.append(self._render_skipped())
        if self.results:
            tables += [self._render_sizes(), self._render_results()]
        return "\n\n".join(tables)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def _render_parts(self) -> str:
        dense = self.sizes[0]
        rows = [("", "parameters", "", "FLOPs", "")]
        for part in self.parts:
            share = _share(part.flops, dense.flops), _share(part.parameters, dense.parameters)
            rows.append((part.name, f"{part.parameters:,}", share[1], shorten(part.flops), share[0]))
        rows.append(("all", f"{dense.parameters:,}", "", shorten(dense.flops), ""))
        return f"{render_table(rows)}\nFLOPs: {self.counted_on}"

    def _render_structures(self) -> str:
        rows = [("can be slimmed", "", "structures", "units of each")]
        rows += [(g.name, g.kind, str(len(g.units)), f"{g} {g.unit}") for g in self.structures]
        return render_table(rows, left=4)

    def _render_skipped(self) -> str:
        if not self.skipped:
            return "nothing is skipped" if self.structures else "nothing in it can be slimmed"
        lines = [f"  {g.kind}  {g.name} ({len(g.names)}): {g.reason}" for g in self.skipped]
        return "\n".join(["skipped", *lines])

    def _render_sizes(self) -> str:
        units = {g.kind: g.unit for g in self.structures}
        rows: list[tuple[str, ...]] = []
        rows.append(("sparsity", units.get("ffn", ""), units.get("mha", ""), "parameters", "left", "FLOPs", "left"))
        dense = self.sizes[0]
        kinds = {name: group.kind for group in self.structures for name in group.names}
        for size in self.sizes:
            left = _share(size.parameters, dense.parameters), _share(size.flops, dense.flops)
            kept = [name_range(n for name, n in size.units.items() if kinds[name] == kind) for kind in _KINDS]
            rows.append((size.asked, *kept, f"{size.parameters:,}", left[0], shorten(size.flops), left[1]))
        return f"{render_table(rows)}\n{_EVENLY}"

    def _render_results(self) -> str:
        rows = [("slim_scope", *(result.scope for result in self.results))]
        rows.append(("saved as", *(result.form or "not at all" for result in self.results)))
        notes: dict[str, int] = {}
        for name in dict.fromkeys(way.name for result in self.results for way in result.ways):
            cells = []
            for result in self.results:
                way = next((way for way in result.ways if way.name == name), None)
                if way is None:
                    cells.append("")
                    continue
                mark = f" ({notes.setdefault(way.note, len(notes) + 1)})" if way.note else ""
                cells.append(("yes" if way.is_open else "no") + mark)
            rows.append((name, *cells))
        lines = [f"({number}) {note}" for note, number in notes.items()]
        return "\n".join([render_table(rows, left=len(rows[0])), *lines])


_KINDS: tuple[Kind, ...] = ("ffn", "mha")
_EVENLY = (
    "Sizes if all layers lose the same, as with slim_scope=local. With slim_scope=global, the default, and with a\n"
    "budget layers end with different sizes of about the same total."
)


def inspect_model(arguments: InspectArguments) -> Inspection:
    """Look at what can be slimmed in a model and what would be left, from its config alone.

    Args:
        arguments: The model, and how much is to go; without the latter some sparsities are tried.

    Returns:
        What was found.

    Raises:
        ValueError: If there is no such config, no model of it can be built, or the settings cannot be carried out.
    """
    settings = arguments.to_settings()
    config = load_config(arguments.model)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{arguments.model} is quantized, and such weights are left alone: name the model that it was made from."
        )
    model = build_without_weights(config, arguments.model)
    write_out(model)
    found = find_structures(model)
    structures = exclude_structures(found.structures, settings.slim_exclude or ())
    operations = _count_operations(model, found, structures)
    if settings.slim_target_flops is not None and operations.costs is None:
        raise ValueError(f"slim_target_flops: operations are {operations.counted_on}: use slim_target_params.")
    asked = _size(model, found, settings) if find_asked(settings) else _size_by_default(structures, settings)
    parameters = count_parameter_costs(model, structures, {})
    sizes = []
    dense: dict[str, Kept] = {"as it is": {}}
    for name, kept in (dense | asked).items():
        units = {s.name: kept.get(s.name, s.units) for s in found.structures}
        flops = None if operations.costs is None else round(operations.costs.total(kept))
        sizes.append(SlimSize(name, units, round(parameters.total(kept)), flops))
    typical = asked[_TYPICAL] if _TYPICAL in asked else next(iter(asked.values()))
    return Inspection(
        arguments.model,
        type(model).__name__,
        find_form(model),
        group_by_place(found.structures),
        group_skipped(found.skipped),
        count_parts(model, found, operations.by_module),
        operations.counted_on,
        tuple(sizes),
        _find_results(model, structures, typical, settings) if structures else (),
    )


def _size(model: PreTrainedModel, found: Discovery, settings: SlimConfig) -> dict[str, Kept]:
    """What is left of what the settings ask for, which are checked as a training checks them."""
    limits = {"round_to": settings.slim_round_to, "min_heads": settings.slim_min_heads}
    plan = make_plan(model, settings, _STEPS, found=found)
    name = ", ".join(f"{field}={getattr(settings, field)}" for field in find_asked(settings))
    if plan.budget is not None:
        sparsity, kept = fit_evenly(plan.structures, plan.budget.costs, plan.budget.asked, **limits)
        return {f"{name} ({sparsity:g} of all)": kept}
    sparsities: dict[Kind, float] = {"ffn": settings.ffn2_sparsity, "mha": settings.mha_sparsity}
    return {name: size_evenly(plan.structures, sparsities, **limits)}


def _size_by_default(structures: Sequence[Structure], settings: SlimConfig) -> dict[str, Kept]:
    """What is left at some sparsities, or above them where the floors keep more."""
    limits = {"round_to": settings.slim_round_to, "min_heads": settings.slim_min_heads}
    return {f"{part:g} of all": size_evenly(structures, {"ffn": part, "mha": part}, **limits) for part in _SPARSITIES}


class _Operations(NamedTuple):
    """The operations of a forward pass: what structures cost, those of all modules, and what they were counted on."""

    costs: Costs | None
    by_module: Mapping[str, int] | None
    counted_on: str


def _count_operations(model: PreTrainedModel, found: Discovery, structures: Sequence[Structure]) -> _Operations:
    try:
        batches = make_batches(model, "inspect")
        skeleton = Skeleton(model, found.structures, {})
        dense = count_flops(skeleton, batches, {})
        costs = count_flop_costs(skeleton, structures, batches, dense)
    except RUN_ERRORS:
        reason = f"{type(model).__name__} runs on no input that is made for it without its weights"
        return _Operations(None, None, f"not counted, since {reason}")
    return _Operations(costs, dense, f"a forward pass on {', '.join(map(describe, batches))}")


def _find_results(
    model: PreTrainedModel, structures: Sequence[Structure], kept: Kept, settings: SlimConfig
) -> tuple[SlimResult, ...]:
    """What comes of sizes that are even, and of sizes that are not; and what a slim model is already."""
    uneven, channels = dict(kept), {s.name: kept[s.name] for s in structures if s.kind == "ffn" and s.name in kept}
    for kind in _KINDS:
        smaller = [s for s in structures if s.kind == kind and kept.get(s.name, s.units) < s.units]
        if len(smaller) > 1 and len({kept[s.name] for s in smaller}) == 1:
            last = smaller[-1]
            uneven[last.name] = min(last.units, kept[last.name] + multiple_of(last, settings.slim_round_to))
    results = [_find_result(model, structures, "global", uneven)]
    if read_budget(settings) is None:  # which ranks layers, so that they end with different sizes
        even = _find_result(model, structures, "local", kept)
        alone = None if even.form == "stock" else _find_result(model, structures, "local, channels alone", channels)
        results[:0] = [even, alone] if alone is not None and alone.form == "stock" else [even]
    if find_form(model) != "stock":
        results.insert(0, _find_result(model, structures, "as it is", {}))
    return tuple(results)


def _find_result(model: PreTrainedModel, structures: Sequence[Structure], scope: str, kept: Kept) -> SlimResult:
    try:
        slim, left = cut_copy(model, structures, kept)
    except ValueError as error:
        return SlimResult(scope, None, (WayOut("save_slimmed", False, str(error)),))
    form = find_form(slim)
    return SlimResult(scope, form, find_ways_out(slim, left, form))


def _share(number: float | None, whole: float | None) -> str:
    return "" if number is None or not whole else f"{100 * number / whole:.1f}%"
