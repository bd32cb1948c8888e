"""The figures of the quality benchmark as a table and as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quality_methods import METHODS
from quality_tasks import TASKS


class Cell(NamedTuple):
    """A method at a sparsity.

    Args:
        added: The loss that it adds to that of the dense model that was trained on, the mean over seeds.
        error: Standard error of that.
        score: The score that people know, the mean.
        parameters: The mean.
        seeds: How many.
    """

    added: float
    error: float
    score: float
    parameters: float
    seeds: int


def find_cells(found: Mapping[Any, Mapping[str, float]], task: str) -> dict[tuple[str, tuple[float, float]], Cell]:
    """The figures of a task: every method at the learning rate that the most seeds were run at."""
    best = _best(found, task)
    dense = best.get(("dense", (0.0, 0.0)), {})
    cells = {}
    for key, runs in best.items():
        seeds = sorted(runs.keys() & dense.keys())
        if seeds:
            added = [runs[seed]["loss"] - dense[seed]["loss"] for seed in seeds]
            cells[key] = Cell(
                statistics.mean(added),
                statistics.stdev(added) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan,
                statistics.mean(runs[seed]["score"] for seed in seeds),
                statistics.mean(runs[seed]["parameters"] for seed in seeds),
                len(seeds),
            )
    return cells


def _best(found: Mapping[Any, Mapping[str, float]], task: str) -> dict[Any, dict[int, Mapping[str, float]]]:
    by_rate: dict[Any, dict[float, dict[int, Mapping[str, float]]]] = {}
    for run, result in found.items():
        if run.task == task and run.method != "base":
            rates = by_rate.setdefault((run.method, run.sparsities), {})
            rates.setdefault(run.rate, {})[run.seed] = result
    first = min((run.seed for run in found), default=0)
    return {
        key: rates[choose_rate({rate: runs[first] for rate, runs in rates.items() if first in runs})]
        for key, rates in by_rate.items()
        if any(first in runs for runs in rates.values())
    }


def choose_rate(tried: Mapping[float, Mapping[str, float]]) -> float:
    """The learning rate with the lowest loss; one that ended in NaN is no choice."""
    return min(tried, key=lambda rate: (math.isnan(tried[rate]["loss"]), tried[rate]["loss"]))


def write_page(found: Mapping[Any, Mapping[str, float]], page: Path) -> None:
    """Write a Markdown table for each task into a page, and the plot beside it.

    Args:
        found: The figures.
        page: Where the tables go; between the comments `figures` and `end of figures`, if it has them.
    """
    tables = "\n".join(["![Loss against sparsity](quality.svg)", "", *_format(found)])
    begin, end = "<!-- figures -->", "<!-- end of figures -->"
    before, _, rest = (page.read_text(encoding="utf-8") if page.exists() else f"{begin}{end}").partition(begin)
    page.write_text(f"{before}{begin}\n\n{tables}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    _draw(found, page.with_name("quality.svg"))


def _format(found: Mapping[Any, Mapping[str, float]]) -> Iterator[str]:
    for name, task in TASKS.items():
        cells = find_cells(found, name)
        if not cells:
            continue
        dense = _best(found, name)["dense", (0.0, 0.0)]
        loss = statistics.mean(result["loss"] for result in dense.values())
        score = task.score[0] if task.score is not None else "perplexity"
        pairs = sorted({pair for _, pair in cells if pair != (0.0, 0.0)})
        yield f"### {task.title}\n"
        yield (
            f"Dense, trained on: loss {loss:.4f}, {score} {cells['dense', (0.0, 0.0)].score:.4f}, "
            f"{cells['dense', (0.0, 0.0)].parameters:,.0f} parameters. Loss added to that, and {score}:\n"
        )
        yield "| method | " + " | ".join(f"{ffn} / {mha}" for ffn, mha in pairs) + " |"
        yield "| --- |" + " ---: |" * len(pairs)
        for method in METHODS.values():
            row = [cells.get((method.name, pair)) for pair in pairs]
            if any(row):
                yield f"| {method.title} | " + " | ".join(_format_cell(cell) for cell in row) + " |"
        yield ""


def _format_cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    error = f" ± {cell.error:.4f}" if cell.seeds > 1 else ""
    return f"{cell.added:+.4f}{error}, {cell.score:.3f}"


def _draw(found: Mapping[Any, Mapping[str, float]], path: Path) -> None:
    """Draw the loss that each method adds against the sparsity, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True)
    for axis, (name, task) in zip(axes.flat, TASKS.items(), strict=True):
        cells = find_cells(found, name)
        pairs = sorted({pair for _, pair in cells if pair != (0.0, 0.0)})
        for number, method in enumerate(METHODS.values()):
            points = [(n, cells[method.name, pair]) for n, pair in enumerate(pairs) if (method.name, pair) in cells]
            if points:
                axis.errorbar(
                    [n for n, _ in points],
                    [cell.added for _, cell in points],
                    [cell.error if cell.seeds > 1 else 0.0 for _, cell in points],
                    label=method.title,
                    marker="o",
                    color=f"C{number}",
                    capsize=2,
                )
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_xticks(range(len(pairs)), [f"{ffn} / {mha}" for ffn, mha in pairs])
        axis.set_title(task.title, fontsize=10)
        axis.set_xlabel("FFN2 / MHA sparsity")
        axis.set_ylabel("loss added to dense")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path)
