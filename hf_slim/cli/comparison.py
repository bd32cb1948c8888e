"""The dense, the masked and the slimmed model side by side."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..saving import render_table
from .answers import to_json
from .data import Task


@dataclass(frozen=True)
class ModelFigures:
    """What was measured of one model.

    Args:
        metrics: The metrics of the task and the loss on the validation data, by name.
        parameters: Number of parameters.
        bytes: Bytes of the saved tensors.
        latency_ms: Median milliseconds of a forward pass of one evaluation batch.
    """

    metrics: dict[str, float]
    parameters: int
    bytes: int
    latency_ms: float


@dataclass(frozen=True)
class Comparison:
    """Two or three models side by side; prints as a table.

    Args:
        dense: The model trained without slimming.
        masked: The model trained with slimming, zero units and all; None where dropped units left it while it trained.
        slimmed: The same model without the dropped units, as loaded from `slim_model`.
        slim_model: The folder of the slimmed model.
        task: What it was trained for.
    """

    dense: ModelFigures
    masked: ModelFigures | None
    slimmed: ModelFigures
    slim_model: str
    task: Task

    def __str__(self) -> str:
        """The table, where the slimmed model lies, and two commands to type next, to load and to push it."""
        models = {"dense": self.dense, "masked": self.masked, "slimmed": self.slimmed}
        columns = {name: figures for name, figures in models.items() if figures is not None}
        rows: list[tuple[str, ...]] = [("", *columns)]
        rows += [(name, *(f"{c.metrics[name]:.4f}" for c in columns.values())) for name in self.dense.metrics]
        rows.append(("parameters", *(f"{figures.parameters:,}" for figures in columns.values())))
        rows.append(("megabytes", *(f"{figures.bytes / 1e6:,.1f}" for figures in columns.values())))
        rows.append(("latency (ms)", *(f"{figures.latency_ms:.2f}" for figures in columns.values())))
        return f"{render_table(rows)}\n\nThe slim model lies in {self.slim_model}. Next:\n\n{self._next_commands()}"

    def _next_commands(self) -> str:
        pipeline = "text-generation" if self.task == "causal-lm" else "text-classification"
        load = f"import hf_slim; from transformers import pipeline; print(pipeline({pipeline!r}, {self.slim_model!r})"
        return f"  python -c \"{load}('some text'))\"\n  hf-slim push {shlex.quote(self.slim_model)} USER/NAME"

    def save(self, path: Path) -> None:
        """Write the figures as JSON.

        Args:
            path: The file. A metric that is not a number, such as the correlation of a constant, is written as null.
        """
        path.write_text(json.dumps(to_json(self), indent=2) + "\n", encoding="utf-8")
