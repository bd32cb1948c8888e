"""`hf-slim bench`: what training, inference and the work of slimming cost, dense against slim."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .costs import measure_inference, measure_times
from .flags import BenchArguments
from .memory import measure_memory
from .shapes import Case, make_cases
from .tables import draw_speed_up, find_growth, format_markdown, format_text
from .train_steps import measure_run, measure_train

_PARTS: dict[str, Callable[[Case], Iterator[dict[str, Any]]]] = {
    "train": measure_train,
    "run": measure_run,
    "inference": measure_inference,
    "times": measure_times,
    "memory": measure_memory,
}
"""What is measured, of each case: `times` once, the others for every size of a batch."""


def run_bench(arguments: BenchArguments) -> str:
    """Measure, and write `bench.json`, `bench.md` and, of train steps and inference, `speedup.png`.

    Args:
        arguments: The flags.

    Returns:
        The tables, and where they lie.

    Raises:
        ValueError: If a model is unknown, too short for the sequences, or cannot reach a sparsity; before any work.
    """
    cases = make_cases(arguments)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results: dict[str, list[dict[str, Any]]] = {part: [] for part in arguments.parts}
    tasks = list(_make_tasks(cases, arguments))
    with logging.tqdm(tasks, desc="Bench") as bar:
        for part, case in bar:
            bar.set_postfix_str(f"{part}, {case}")
            results[part] += _PARTS[part](case)
            _write_json(folder / "bench.json", results, arguments)  # what is there if a later one fails
    results["growth"] = find_growth(results)
    _write_json(folder / "bench.json", results, arguments)
    (folder / "bench.md").write_text(
        f"# {_describe(arguments)}\n\n`{_command(arguments)}`\n\n{format_markdown(results)}", encoding="utf-8"
    )
    removed = {(c.name, c.config.num_hidden_layers, str(c.sparsity)): c.removed for c in cases}
    written = ["bench.json", "bench.md"]
    if results.get("train") or results.get("inference"):
        draw_speed_up(results, removed, folder / "speedup.png")
        written.append("speedup.png")
    return f"{format_text(results)}\n\nThe figures lie in {folder}: {', '.join(written)}"


def _make_tasks(cases: list[Case], arguments: BenchArguments) -> Iterator[tuple[str, Case]]:
    sizes = list(itertools.product(arguments.batch_sizes, arguments.sequence_lengths))
    for case in cases:
        for part in dict.fromkeys(arguments.parts):
            for batch_size, length in [(0, 0)] if part == "times" else sizes:
                yield part, replace(case, batch_size=batch_size, length=length)


def _write_json(path: Path, results: dict[str, list[dict[str, Any]]], arguments: BenchArguments) -> None:
    environment = {
        "hf_slim": version("hf-slim"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": _device_name(arguments),
        "threads": torch.get_num_threads(),
    }
    content = {"command": _command(arguments), "environment": environment, **results}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _describe(arguments: BenchArguments) -> str:
    return (
        f"hf-slim {version('hf-slim')}, torch {torch.__version__}, {_device_name(arguments)}, "
        f"{torch.get_num_threads()} threads, {arguments.dtype}"
    )


def _device_name(arguments: BenchArguments) -> str:
    return torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"


def _command(arguments: BenchArguments) -> str:
    """The command that measures the same again."""
    flags = []
    for name, value in vars(arguments).items():
        if value is not None and name in BenchArguments.__dataclass_fields__:
            flags.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return f"hf-slim bench {' '.join(flags)}"
