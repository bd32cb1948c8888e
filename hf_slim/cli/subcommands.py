"""The subcommands of `hf-slim` whose flags are fields of dataclasses."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ..arguments import SlimConfig, SlimTrainingArguments
from .answers import Answer, answer
from .data import DataArguments
from .demo import demo_flags, write_demo
from .flags import Kinds, describe_all_flags, describe_flags, parse_flags, read_flags
from .prune import PruneArguments, prune
from .run import ModelArguments, run
from .start import Start

_RUN: Kinds = {"Model": ModelArguments, "Data": DataArguments, "Slimming": SlimTrainingArguments}
_PRUNE: Kinds = {"Model": PruneArguments, "Data": DataArguments, "Slimming": SlimConfig}
_DOES = {
    "demo": "Train a small BERT on generated sentence pairs, dense and slimmed, and compare. No flag is needed.",
    "run": "Train a model on your data, slimmed and dense, under the same settings, and compare.",
    "prune": "Slim a trained model in one shot, without training, calibrated on your data, and save it.",
    "bench": "Measure what training and inference cost, dense and slim, and what slimming costs.",
}


def run_command(command: str, flags: Sequence[str]) -> int:
    """Run a subcommand, and print what it gives, or its help.

    Args:
        command: `demo`, `run`, `prune` or `bench`.
        flags: The arguments after it.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an argument, a file or a column does not fit, or what bench needs is not installed.
    """
    kinds = _bench_kinds() if command == "bench" else _PRUNE if command == "prune" else _RUN
    for words, describe in (({"--help-all"}, describe_all_flags), ({"-h", "--help"}, describe_flags)):
        if words & set(flags):
            print(describe(f"hf-slim {command}", _DOES[command], kinds))
            return 0
    rest = [flag for flag in flags if flag != "--json"]
    return answer(lambda: _run(command, rest, kinds), as_json="--json" in flags)


def _bench_kinds() -> Kinds:
    try:
        from ..bench import BenchArguments
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ValueError(f"this needs {package}: `pip install {package}`") from error
    return {"Measuring": BenchArguments}


def _run(command: str, flags: Sequence[str], kinds: Kinds) -> Any:
    if command == "prune":
        return prune(*parse_flags(flags, kinds))
    if command == "bench":
        return _bench(*parse_flags(flags, kinds))
    parsed = _parse_demo(flags) if command == "demo" else parse_flags(flags, kinds)
    model, data, training = parsed
    output_dir = Path(training.output_dir)
    _set_up_logging(training)
    with Start(output_dir) as start:
        if command == "demo":
            write_demo(output_dir / "data")
        return run(model, data, training, start)


def _bench(arguments: Any) -> Answer:
    from ..bench import run_bench

    text = run_bench(arguments)
    return Answer(text, json.loads((Path(arguments.output_dir) / "bench.json").read_text(encoding="utf-8")))


def _parse_demo(flags: Sequence[str]) -> tuple[Any, ...]:
    """The arguments of the demo, whose files are not written yet."""
    output_dir = read_flags(flags, _RUN).get("output_dir") or "hf_slim_demo"
    defaults = read_flags(demo_flags(Path(output_dir) / "data"), _RUN) | {"output_dir": output_dir}
    return parse_flags(flags, _RUN, defaults)


def _set_up_logging(arguments: SlimTrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    transformers_logging.set_verbosity(arguments.get_process_log_level())
