"""The figures of `hf-slim bench` as tables and as a plot."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..saving import render_table

Records = Sequence[Mapping[str, Any]]


_WHO = "model {model} | layers {layers} | FFN2,MHA {sparsity}"
_SIZE = f"{_WHO} | batch {{batch_size}} | length {{sequence_length}}"
_SPEED_UP = "speed-up {speed_up:.2f} | ideal {ideal:.2f} | reached {fraction:.0%}"
_TABLES = (
    (
        "train",
        "Train steps",
        f"{_SIZE} | step {{step}} | ms {{ms:.1f}} | / plain {{against_plain:.3f}} | extra, ms {{extra_ms:.2f}} | "
        f"extra, % {{extra:100*.2f}} | at most, % {{extra_most:100*.2f}} | {_SPEED_UP}",
    ),
    (
        "run",
        "Fine-tuning runs",
        f"{_SIZE} | steps {{steps}} | dense, s {{dense_s:.1f}} | slim, s {{slim_s:.1f}} | {_SPEED_UP}",
    ),
    (
        "inference",
        "Inference",
        f"{_SIZE} | dense, ms {{dense_ms:.2f}} | slim, ms {{slim_ms:.2f}} | stock, ms {{stock_ms:.2f}} | "
        "stock from {stock_from} | slim / stock {slim_over_stock:.3f} | "
        f"dense, GFLOPs {{dense_flops:1e-9*.3f}} | slim, GFLOPs {{slim_flops:1e-9*.3f}} | {_SPEED_UP}",
    ),
    (
        "times",
        "Parsing, scoring, compacting",
        f"{_WHO} | parameters {{parameters:,}} | slim {{slim_parameters:,}} | "
        "first parse, ms {first_parse_s:1e3*.1f} | parse, ms {parse_s:1e3*.1f} | score, ms {score_s:1e3*.2f} | "
        "read weights, ms {read_s:1e3*.1f} | compact, ms {compact_s:1e3*.1f} | compact / read {compact_over_read:.2f}",
    ),
    (
        "times",
        "Saving, loading",
        f"{_WHO} | save dense, ms {{save_dense_s:1e3*.0f}} | save slim, ms {{save_slim_s:1e3*.0f}} | "
        "save_slimmed, ms {save_slimmed_s:1e3*.0f} | load dense, ms {load_dense_s:1e3*.1f} | "
        "load slim, ms {load_slim_s:1e3*.1f} | slim / dense {load_ratio:.3f} | "
        "load and read dense, ms {load_read_dense_s:1e3*.1f} | load and read slim, ms {load_read_slim_s:1e3*.1f} | "
        "slim / dense {load_read_ratio:.3f} | share of bytes {share:.3f}",
    ),
    (
        "memory",
        "Peak memory",
        f"{_SIZE} | what {{what}} | peak, MB {{peak_bytes:1e-6*.1f}} | ratio {{ratio:.4f}} | to {{against}}",
    ),
    (
        "growth",
        "Growth with the number of layers",
        "model {model} | FFN2,MHA {sparsity} | cost {cost} | layers {layers} | ms {ms:.2f} | "
        "ms a layer {ms_per_layer:.4f} | a layer / that at the fewest {ratio:.2f}",
    ),
)
"""For each table the part whose records it shows, its title, and its columns: headers, each with a field of a record.

A factor before a format, as in `{parse_s:1e3*.1f}`, makes milliseconds of seconds.
"""
_WORDS = ("model", "FFN2,MHA", "step", "stock from", "what", "to", "cost")
"""Columns of words, which are aligned to the left."""
_GROWING = ("first_parse_s", "parse_s", "score_s", "compact_s", "save_slimmed_s", "load_slim_s")


def find_growth(results: Mapping[str, Records]) -> list[dict[str, Any]]:
    """How costs grow with the number of layers: if linearly, a layer costs the same in a deep model.

    Args:
        results: The records by part.

    Returns:
        For each cost, of those that are paid once and of the extra work in train steps, and each number of layers
        milliseconds, milliseconds a layer, and their ratio to those of the model with the fewest layers; nothing for a
        model that was measured with one number of layers only.
    """
    costs: dict[tuple[str, str, str], dict[int, float]] = {}
    for record in results.get("times", ()):
        for cost in _GROWING:
            key = (record["model"], record["sparsity"], cost.removesuffix("_s"))
            costs.setdefault(key, {})[record["layers"]] = 1000 * record[cost]
    for record in results.get("train", ()):
        if record["extra_ms"]:
            cost = f"extra of a {record['step']} step, {record['batch_size']} x {record['sequence_length']}"
            key = (record["model"], record["sparsity"], cost)
            costs.setdefault(key, {})[record["layers"]] = record["extra_ms"]
    return [
        {
            "model": model,
            "sparsity": sparsity,
            "cost": cost,
            "layers": layers,
            "ms": found[layers],
            "ms_per_layer": found[layers] / layers,
            "ratio": found[layers] / layers / (found[min(found)] / min(found)),
        }
        for (model, sparsity, cost), found in costs.items()
        for layers in sorted(found)
        if len(found) > 1
    ]


def format_text(results: Mapping[str, Records]) -> str:
    """All tables as plain text.

    Args:
        results: The records by part.

    Returns:
        The tables with their titles.
    """
    return "\n\n".join(f"{title}\n\n{render_table(rows, left=3)}" for title, rows in _make_tables(results))


def format_markdown(results: Mapping[str, Records]) -> str:
    """All tables in Markdown.

    Args:
        results: The records by part.

    Returns:
        The tables, each under a heading.
    """
    parts = []
    for title, rows in _make_tables(results):
        rule = ["---" if header in _WORDS else "---:" for header in rows[0]]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
        parts.append(f"## {title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw_speed_up(results: Mapping[str, Records], removed: Mapping[tuple[str, int, str], float], path: Path) -> None:
    """Draw the speed-up of train steps and inference against the sparsity.

    Args:
        results: The records by part.
        removed: For each model, number of layers and sparsity the fraction of the weights of its structures that the
            slim model lacks.
        path: The PNG to write.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    live = [record for record in results.get("train", ()) if record["step"] == "live"]
    for axis, title, records in zip(
        axes, ("Train step", "Inference"), (live, results.get("inference", ())), strict=True
    ):
        axis.set(title=title, xlabel="sparsity: fraction of the FFN and attention weights removed")
        axis.grid(alpha=0.3)
        for number, (label, curve) in enumerate(_group(records).items()):
            points = sorted(
                (removed[r["model"], r["layers"], r["sparsity"]], r["speed_up"], r["ideal"]) for r in curve
            )
            where, speed_up, ideal = zip((0.0, 1.0, 1.0), *points, strict=True)
            axis.plot(where, speed_up, "o-", color=f"C{number % 10}", label=label)
            axis.plot(where, ideal, "--", color=f"C{number % 10}", alpha=0.6)
        if records:
            axis.plot([], [], "--", color="grey", label="ideal, by FLOPs")
            axis.legend(fontsize="small")
    axes[0].set_ylabel("speed-up over dense")
    figure.savefig(path, dpi=120)


def _group(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each curve, which differ in the sparsity only."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for r in records:
        label = f"{Path(r['model']).name}, {r['layers']} layers, {r['batch_size']} x {r['sequence_length']}"
        curves.setdefault(label, []).append(r)
    return curves


def _make_tables(results: Mapping[str, Records]) -> Iterator[tuple[str, list[list[str]]]]:
    """The titles of the tables that have lines, and their cells, the headers first."""
    cells = _Cells()
    for part, title, columns in _TABLES:
        headers, fields = zip(*(column.rsplit(" ", 1) for column in columns.split(" | ")), strict=True)
        if records := results.get(part):
            yield title, [list(headers), *([cells.format(field, **record) for field in fields] for record in records)]


class _Cells(string.Formatter):
    """Formats with a factor; a dash for what there is not."""

    def format_field(self, value: Any, spec: str) -> str:
        factor, _, spec = spec.rpartition("*")
        return "-" if value is None else format(value * float(factor) if factor else value, spec)
