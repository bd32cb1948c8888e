"""The figures of `hf-slim bench` as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..saving import render_table

Records = Sequence[Mapping[str, Any]]


class _Column(NamedTuple):
    header: str
    key: str
    spec: str = ""
    factor: float = 1


_WHO = (_Column("model", "model"), _Column("layers", "layers"), _Column("FFN2,MHA", "sparsity"))
_SIZE = (_Column("batch", "batch_size"), _Column("length", "sequence_length"))
TABLES: dict[str, tuple[str, str, tuple[_Column, ...]]] = {
    "train": (
        "train",
        "Train steps",
        (
            *_WHO,
            *_SIZE,
            _Column("step", "step"),
            _Column("ms", "ms", ".1f"),
            _Column("/ plain", "against_plain", ".3f"),
            _Column("extra, ms", "extra_ms", ".2f"),
            _Column("extra, %", "extra", ".2f", 100),
            _Column("at most, %", "extra_most", ".2f", 100),
            _Column("speed-up", "speed_up", ".2f"),
            _Column("ideal", "ideal", ".2f"),
            _Column("reached", "fraction", ".0%"),
        ),
    ),
    "run": (
        "run",
        "Fine-tuning runs",
        (
            *_WHO,
            *_SIZE,
            _Column("steps", "steps"),
            _Column("dense, s", "dense_s", ".1f"),
            _Column("slim, s", "slim_s", ".1f"),
            _Column("speed-up", "speed_up", ".2f"),
            _Column("ideal", "ideal", ".2f"),
            _Column("reached", "fraction", ".0%"),
        ),
    ),
    "inference": (
        "inference",
        "Inference",
        (
            *_WHO,
            *_SIZE,
            _Column("dense, ms", "dense_ms", ".2f"),
            _Column("slim, ms", "slim_ms", ".2f"),
            _Column("stock, ms", "stock_ms", ".2f"),
            _Column("stock from", "stock_from"),
            _Column("slim / stock", "slim_over_stock", ".3f"),
            _Column("dense, GFLOPs", "dense_flops", ".3f", 1e-9),
            _Column("slim, GFLOPs", "slim_flops", ".3f", 1e-9),
            _Column("speed-up", "speed_up", ".2f"),
            _Column("ideal", "ideal", ".2f"),
            _Column("reached", "fraction", ".0%"),
        ),
    ),
    "costs": (
        "times",
        "Parsing, scoring, compacting",
        (
            *_WHO,
            _Column("parameters", "parameters", ","),
            _Column("slim", "slim_parameters", ","),
            _Column("first parse, ms", "first_parse_s", ".1f", 1000),
            _Column("parse, ms", "parse_s", ".1f", 1000),
            _Column("score, ms", "score_s", ".2f", 1000),
            _Column("read weights, ms", "read_s", ".1f", 1000),
            _Column("compact, ms", "compact_s", ".1f", 1000),
            _Column("compact / read", "compact_over_read", ".2f"),
        ),
    ),
    "files": (
        "times",
        "Saving, loading",
        (
            *_WHO,
            _Column("save dense, ms", "save_dense_s", ".0f", 1000),
            _Column("save slim, ms", "save_slim_s", ".0f", 1000),
            _Column("save_slimmed, ms", "save_slimmed_s", ".0f", 1000),
            _Column("load dense, ms", "load_dense_s", ".1f", 1000),
            _Column("load slim, ms", "load_slim_s", ".1f", 1000),
            _Column("slim / dense", "load_ratio", ".3f"),
            _Column("load and read dense, ms", "load_read_dense_s", ".1f", 1000),
            _Column("load and read slim, ms", "load_read_slim_s", ".1f", 1000),
            _Column("slim / dense", "load_read_ratio", ".3f"),
            _Column("share of bytes", "share", ".3f"),
        ),
    ),
    "memory": (
        "memory",
        "Peak memory",
        (
            *_WHO,
            *_SIZE,
            _Column("what", "what"),
            _Column("peak, MB", "peak_bytes", ".1f", 1e-6),
            _Column("ratio", "ratio", ".4f"),
            _Column("to", "against"),
        ),
    ),
    "growth": (
        "growth",
        "Growth with the number of layers",
        (
            _Column("model", "model"),
            _Column("FFN2,MHA", "sparsity"),
            _Column("cost", "cost"),
            _Column("layers", "layers"),
            _Column("ms", "ms", ".2f"),
            _Column("ms a layer", "ms_per_layer", ".4f"),
            _Column("a layer / that at the fewest", "ratio", ".2f"),
        ),
    ),
}
"""For each table the list of records that it shows, its title, and its columns."""

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
        rule = tuple("---" if header in _WORDS else "---:" for header in rows[0])
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
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
    pyplot.close(figure)


def _group(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each curve, which differ in the sparsity only."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for r in records:
        label = f"{Path(r['model']).name}, {r['layers']} layers, {r['batch_size']} x {r['sequence_length']}"
        curves.setdefault(label, []).append(r)
    return curves


def _make_tables(results: Mapping[str, Records]) -> list[tuple[str, list[tuple[str, ...]]]]:
    tables = []
    for part, title, columns in TABLES.values():
        records = results.get(part)
        if records:
            rows = [tuple(column.header for column in columns)]
            rows += [tuple(_format(record[column.key], column) for column in columns) for record in records]
            tables.append((title, rows))
    return tables


def _format(value: Any, column: _Column) -> str:
    if value is None:
        return "-"
    return format(value * column.factor if column.factor != 1 else value, column.spec)
