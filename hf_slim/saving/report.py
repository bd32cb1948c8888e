"""What slimming changed: parameters, bytes, the size of every structure, latency."""

from __future__ import annotations

import functools
import io
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.box import Box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..costs import BudgetReport, time_alternately
from ..structures import Kind

_RULE = Box("    \n" * 2 + " -- \n" + "    \n" * 5, ascii=True)
"""No line but one under the header."""


@dataclass(frozen=True)
class StructureSize:
    """The size of one structure before and after.

    Args:
        name: Dotted name of the structure.
        kind: `ffn` or `mha`.
        before: Units that it had.
        after: Units that are left.
    """

    name: str
    kind: Kind
    before: int
    after: int


@dataclass(frozen=True)
class SlimReport:
    """What slimming made of a model; prints as a table.

    Args:
        parameters_before: Parameters of the model before.
        parameters_after: Parameters of the slimmed model.
        bytes_before: Bytes of the saved tensors before.
        bytes_after: Bytes of the saved tensors of the slimmed model.
        structures: The size of every structure, in the order of the model's modules.
        unproven: Names of the structures that have lost units without proof that the model computes the same without
            them, since the inputs of the comparison reach none of their layers, or nothing was compared.
        budget: What was asked for by a budget, and what came of it; None if none was.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    structures: tuple[StructureSize, ...]
    unproven: tuple[str, ...] = ()
    budget: BudgetReport | None = None

    def __str__(self) -> str:
        """The totals, then a line for each structure, then the budget, then those that are not proven."""
        rows = [
            ("", "", "before", "after", "change"),
            _row("parameters", "", self.parameters_before, self.parameters_after),
            _row("megabytes", "", self.bytes_before / 1e6, self.bytes_after / 1e6, ",.1f"),
            *(_row(size.name, size.kind, size.before, size.after) for size in self.structures),
        ]
        lines = [render_table(rows, left=2)]
        if self.budget is not None:
            lines.append(f"budget: {self.budget}")
        if self.unproven:
            lines.append(f"not proven: {', '.join(self.unproven)}")
        return "\n".join(lines)


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


def _row(name: str, kind: str, before: float, after: float, spec: str = ",") -> tuple[str, ...]:
    return name, kind, format(before, spec), format(after, spec), f"{100 * (after - before) / before:+.1f}%"
