"""What slimming changed: parameters, bytes, the size of every structure, latency."""

from __future__ import annotations

import functools
import io
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from rich.box import Box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..costs import BudgetReport, time_alternately
from .figures import plot_layers
from .layer_bars import StructureSize
from .layer_svg import draw_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_RULE = Box("    \n" * 2 + " -- \n" + "    \n" * 5, ascii=True)
"""No line but one under the header."""
SLIM_ALREADY = (
    "The model was slim already when it was loaded, by the slim_report.json of its folder, but its structures or "
    'their units are not those of that report: "before" is not the dense model, but what was loaded.'
)
"""In what a report misses, where it cannot be told what a model was."""


@dataclass(frozen=True)
class SlimReport:
    """What slimming made of a model; prints as a table, and a notebook shows it with a picture.

    Args:
        parameters_before: Parameters of the model before.
        parameters_after: Parameters of the slimmed model.
        bytes_before: Bytes of the saved tensors before.
        bytes_after: Bytes of the saved tensors of the slimmed model.
        structures: The size of every structure, in the order of the model's modules.
        unproven: Names of the structures that have lost units without proof that the model computes the same without
            them, since the inputs of the comparison reach none of their layers, or nothing was compared.
        budget: What was asked for by a budget, and what came of it; None if none was.
        flops_before: Floating-point operations of a forward pass on one example before; None if they were not counted.
            Of a text it is of 128 tokens, or of half as many as the model has positions, if that is less.
        flops_after: Those of the slimmed model.
        milliseconds_before: How long that forward pass took before, both timed in turn; None if it was not timed.
            Two reports of the same slimming are equal, whatever was timed.
        milliseconds_after: How long that of the slimmed model took.
        machine: What they were timed on.
        missing: Which of these costs are not known, and why; empty if all are, or none were asked for.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    structures: tuple[StructureSize, ...]
    unproven: tuple[str, ...] = ()
    budget: BudgetReport | None = None
    flops_before: int | None = None
    flops_after: int | None = None
    milliseconds_before: float | None = field(default=None, compare=False)
    milliseconds_after: float | None = field(default=None, compare=False)
    machine: str = field(default="", compare=False)
    missing: str = field(default="", compare=False)

    def __str__(self) -> str:
        """The totals, a line for each structure, the budget, those not proven, and whether it was slim before."""
        rows = [
            ("", "", "before", "after", "change"),
            *((name, "", *_row(name, before, after, spec)[1:]) for name, before, after, spec in self.list_totals()),
            *((size.name, size.kind, *_row("", size.before, size.after, ",")[1:]) for size in self.structures),
        ]
        lines = [render_table(rows, left=2)]
        if self.budget is not None:
            lines.append(f"budget: {self.budget}")
        if self.unproven:
            lines.append(f"not proven: {', '.join(self.unproven)}")
        if SLIM_ALREADY in self.missing:
            lines.append(SLIM_ALREADY)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as what JSON can hold.

        Returns:
            The fields by their names; structures as a list of dicts with `name`, `kind`, `before` and `after`.
        """
        fields = asdict(self)
        return fields | {"structures": list(fields["structures"]), "unproven": list(self.unproven)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SlimReport:
        """The reverse of `to_dict`.

        Args:
            fields: What it gave, perhaps read from JSON; or the whole content of a `slim_report.json`.

        Returns:
            The report.

        Raises:
            ValueError: If it is no report.
        """
        fields = _find_fields(fields)
        budget = fields.get("budget")
        try:
            return cls(
                **{
                    **fields,
                    "structures": tuple(StructureSize(**size) for size in fields["structures"]),
                    "unproven": tuple(fields.get("unproven", ())),
                    "budget": None if budget is None else BudgetReport(**budget),
                }
            )
        except TypeError as error:
            raise ValueError(
                f"SlimReport.from_dict: what it was given is no report of this version: {error}."
            ) from error

    def to_pandas(self) -> DataFrame:
        """The sizes of the structures as a table of pandas.

        Returns:
            A row for each structure, by its name: `kind`, `before`, `after`, and `kept`, the fraction of its units.

        Raises:
            ImportError: If pandas is not there.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("SlimReport.to_pandas needs pandas: `pip install pandas`.") from error
        rows = [(s.name, s.kind, s.before, s.after, s.after / s.before) for s in self.structures]
        return DataFrame(rows, columns=["name", "kind", "before", "after", "kept"]).set_index("name")

    def plot(self) -> Figure:
        """Plot the units that each layer keeps, with the outline of what it had behind them.

        Returns:
            A matplotlib figure, which a notebook shows and `savefig` writes; its background is transparent, and its
            colours are readable on a light page and a dark one.

        Raises:
            ImportError: If matplotlib is not there.
            ValueError: If the report has no structures.
        """
        return plot_layers(self.structures)

    def list_totals(self) -> Iterator[tuple[str, float, float, str]]:
        """What the model had and has as a whole.

        Yields:
            A name, the numbers before and after, and how they are to be formatted; only what is known.
        """
        yield "parameters", self.parameters_before, self.parameters_after, ",.0f"
        yield "megabytes", self.bytes_before / 1e6, self.bytes_after / 1e6, ",.1f"
        if self.flops_before and self.flops_after is not None:
            unit, name = (1e9, "GFLOPs") if self.flops_before >= 1e9 else (1e6, "MFLOPs")
            yield name, self.flops_before / unit, self.flops_after / unit, ",.1f"
        if self.milliseconds_before and self.milliseconds_after is not None:
            yield "latency (ms)", self.milliseconds_before, self.milliseconds_after, ",.2f"

    def _repr_html_(self) -> str:
        """The totals, the picture of the layers, and a table of the structures to unfold."""
        totals = [("", "before", "after", "change"), *(_row(*total) for total in self.list_totals())]
        sizes: list[tuple[str, ...]] = [("structure", "kind", "before", "after", "change")]
        sizes += [(size.name, size.kind, *_row("", size.before, size.after, ",")[1:]) for size in self.structures]
        notes = [f"latency of a forward pass on {self.machine}"] if self.milliseconds_before else []
        notes += [self.missing] if self.missing else []
        notes += [f"budget: {self.budget}"] if self.budget is not None else []
        notes += [f"not proven: {', '.join(self.unproven)}"] if self.unproven else []
        return (
            f"<div>{_make_html_table(totals)}{draw_layers(self.structures)}"
            f"<details><summary>{len(self.structures)} structures</summary>{_make_html_table(sizes)}</details>"
            f"{''.join(f'<p>{escape(note)}</p>' for note in notes)}</div>"
        )


def render_table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out rows of text as a plain table of rich, as wide as it comes.

    Args:
        rows: The header and then the lines.
        left: How many columns, from the first, are aligned to the left; the others are aligned to the right.

    Returns:
        The table, one line a row, with a rule under the header and no trailing blanks.
    """
    table = Table(box=_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(rows[0]):
        table.add_column(header, justify="left" if number < left else "right")
    for row in rows[1:]:
        table.add_row(*row)
    text = io.StringIO()
    Console(
        file=text,
        width=sys.maxsize,
        color_system=None,
        force_jupyter=False,  # in a notebook it would be shown at once, and the text stay empty
        markup=False,
        emoji=False,
        highlight=False,
    ).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def shorten(number: float | None) -> str:
    """A large number to four digits.

    Args:
        number: The number.

    Returns:
        For example `1.283 T`; nothing for None.
    """
    if number is None:
        return ""
    power = max(0, min(4, (len(str(round(number))) - 1) // 3))
    return f"{number / 1000**power:.4g} {' KMGT'[power]}".strip()


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, each distinct parameter once.

    Args:
        model: Any module.

    Returns:
        The number of scalar parameters; tied weights count once.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Count the bytes of the tensors that saving a model writes.

    Args:
        model: Any module.

    Returns:
        Bytes of all parameters and persistent buffers; a tensor known under several names counts once.
    """
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], *, repeats: int = 20
) -> dict[str, float]:
    """Time a forward pass of several models, alternately, so that a busy machine slows all of them alike.

    Every model runs in evaluation mode and comes back in the mode it was in.

    Args:
        models: The models by name.
        inputs: The keyword arguments of the forward pass, on the device of the models.
        repeats: Timed passes of each model.

    Returns:
        The median time of a forward pass in milliseconds, for each name.

    Raises:
        ValueError: If `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}: it is the number of timed passes of each model.")
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    modes = {module: module.training for model in models.values() for module in model.modules()}
    calls = {name: functools.partial(model, **inputs) for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            times = time_alternately(calls, repeats=repeats, device=device, desc="Latency")
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}


def _find_fields(given: Any) -> Mapping[str, Any]:
    """The fields of a report, which may lie in the content of a `slim_report.json`."""
    fields = given.get("report", given) if isinstance(given, Mapping) else given
    known = [name for name, f in SlimReport.__dataclass_fields__.items() if f.default is MISSING]
    if not isinstance(fields, Mapping) or (lacking := [name for name in known if name not in fields]):
        what = f"lacks {', '.join(lacking)}" if isinstance(fields, Mapping) else f"is a {type(fields).__name__}"
        raise ValueError(
            f"SlimReport.from_dict takes what to_dict gave, or the content of a slim_report.json; this {what}."
        )
    return fields


def _row(name: str, before: float, after: float, spec: str) -> tuple[str, ...]:
    return name, format(before, spec), format(after, spec), f"{100 * (after - before) / before:+.1f}%"


def _make_html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, numbers to the right."""
    cells = [
        [f"<{tag}{'' if column == 0 else right}>{escape(text)}</{tag}>" for column, text in enumerate(row)]
        for number, row in enumerate(rows)
        for tag, right in [("th" if number == 0 else "td", ' style="text-align: right"')]
    ]
    lines = [f"<tr>{''.join(row)}</tr>" for row in cells]
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"
