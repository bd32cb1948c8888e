"""What slimming changed: parameters, bytes, the size of every structure, latency."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..structures import Kind
from .latency import time_alternately


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
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    structures: tuple[StructureSize, ...]
    unproven: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The totals, then a line for each structure, then those that are not proven."""
        totals = [
            ("", "", "before", "after", "change"),
            (
                "parameters",
                "",
                f"{self.parameters_before:,}",
                f"{self.parameters_after:,}",
                _change(self.parameters_before, self.parameters_after),
            ),
            (
                "megabytes",
                "",
                f"{self.bytes_before / 1e6:,.1f}",
                f"{self.bytes_after / 1e6:,.1f}",
                _change(self.bytes_before, self.bytes_after),
            ),
        ]
        sizes = [
            (size.name, size.kind, f"{size.before:,}", f"{size.after:,}", _change(size.before, size.after))
            for size in self.structures
        ]
        table = format_table([*totals, *sizes], left=2)
        return f"{table}\nnot proven: {', '.join(self.unproven)}" if self.unproven else table


def format_table(rows: list[tuple[str, ...]], *, left: int = 1) -> str:
    """Lay out rows of text as a plain table with a rule under the first row.

    Args:
        rows: The header and then the lines, all of the same length.
        left: How many columns, from the first, are aligned to the left; the others are aligned to the right.

    Returns:
        The table, one line a row, with no trailing blanks.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


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


def _change(before: int, after: int) -> str:
    return f"{100 * (after - before) / before:+.1f}%"
