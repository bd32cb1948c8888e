"""`hf-slim bench`: what training, inference and the work of slimming cost, dense against slim."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
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

_PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "train": measure_train,
    "run": measure_run,
    "inference": measure_inference,
    "memory": measure_memory,
}
"""What is measured for every size of a batch."""


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
        for part, what, measure in bar:
            bar.set_postfix_str(f"{part}, {what}")
            results[part] += measure()
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


def _make_tasks(
    cases: list[Case], arguments: BenchArguments
) -> Iterator[tuple[str, str, Callable[[], Iterator[dict[str, Any]]]]]:
    for case in cases:
        what = f"{case.name}, {case.config.num_hidden_layers} layers, {case.sparsity}"
        for part in dict.fromkeys(arguments.parts):
            if part == "times":
                yield part, what, partial(measure_times, case, arguments)
                continue
            for batch_size in arguments.batch_sizes:
                for length in arguments.sequence_lengths:
                    measure = partial(_PARTS[part], case, batch_size, length, arguments)
                    yield part, f"{what}, {batch_size} x {length}", measure


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
