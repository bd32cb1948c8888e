"""The subcommands of `hf-slim`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from ..arguments import SlimConfig, SlimTrainingArguments
from .data import DataArguments
from .demo import demo_flags, write_demo
from .prune import PruneArguments, prune
from .run import ModelArguments, run

_Flags = tuple[ModelArguments, DataArguments, SlimTrainingArguments]


def run_command(command: str, flags: list[str]) -> int:
    """Run a subcommand, and print what it gives.

    Args:
        command: `demo`, `run`, `prune` or `bench`.
        flags: The arguments after it.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an argument, a file or a column does not fit.
        SystemExit: After help, or with a message about the usage or what bench needs and is not installed.
    """
    if command == "bench":
        try:
            from ..bench import BenchArguments, run_bench
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise SystemExit(f'hf-slim bench needs {package}: pip install "hf-slim[bench]"') from error
        print(f"\n{run_bench(*_parse(flags, 'hf-slim bench', BenchArguments))}")
        return 0
    if command == "prune":
        print(f"\n{prune(*_parse(flags, 'hf-slim prune', PruneArguments, DataArguments, SlimConfig))}")
        return 0
    parsed = _parse_demo(flags) if command == "demo" else _parse_run(flags, "hf-slim run")
    _set_up_logging(parsed[2])
    print(f"\n{run(*parsed)}")
    return 0


def _parse_demo(flags: list[str]) -> _Flags:
    """The arguments of the demo, whose files are written now."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="hf_slim_demo")
    known, rest = parser.parse_known_args(flags)
    folder = Path(known.output_dir) / "data"
    parsed = _parse_run([*demo_flags(folder), "--output_dir", known.output_dir, *rest], "hf-slim demo")
    write_demo(folder)
    return parsed


def _parse_run(flags: list[str], prog: str) -> _Flags:
    return _parse(flags, prog, ModelArguments, DataArguments, SlimTrainingArguments)


def _parse(flags: list[str], prog: str, *kinds: type) -> Any:
    """The flags, or what a .json file holds of them, as an instance of each of the dataclasses."""
    parser = HfArgumentParser(kinds, prog=prog)
    if len(flags) == 1 and flags[0].endswith(".json"):
        return parser.parse_json_file(flags[0])
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def _set_up_logging(arguments: SlimTrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    transformers_logging.set_verbosity(arguments.get_process_log_level())
