"""The `hf-slim` command."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..arguments import SlimTrainingArguments
    from .data import DataArguments
    from .run import ModelArguments


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name; those of the process if not given.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an argument, a file or a column does not fit.
        SystemExit: After help, or with a message about the usage or what bench needs and is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="hf-slim",
        description="Make a transformer model smaller and faster while it is fine-tuned, and compare it with the "
        "model trained dense.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="demo   generated sentence pairs and a small BERT: no files and no network needed\n"
        "run    your model and data: flags, or one .json file of them\n"
        "bench  times, FLOPs and peak memory of dense and slim models, as tables and a plot\n\n"
        "hf-slim run --help and hf-slim bench --help list the flags. demo takes those of run and has a default for "
        "what it needs.",
    )
    parser.add_argument("command", choices=["demo", "run", "bench"])
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(argv)
    # The commands are imported now, so that the usage is printed without the seconds that this takes.
    if chosen.command == "bench":
        try:
            from ..bench import BenchArguments, run_bench
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise SystemExit(f'hf-slim bench needs {package}: pip install "hf-slim[bench]"') from error
        print(f"\n{run_bench(*_parse(chosen.flags, 'hf-slim bench', BenchArguments))}")
        return 0
    from .run import run

    flags = _parse_demo(chosen.flags) if chosen.command == "demo" else _parse_run(chosen.flags, "hf-slim run")
    _set_up_logging(flags[2])
    print(f"\n{run(*flags)}")
    return 0


def _parse_demo(flags: list[str]) -> tuple[ModelArguments, DataArguments, SlimTrainingArguments]:
    """The arguments of the demo, whose files are written now."""
    from .demo import demo_flags, write_demo

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="hf_slim_demo")
    known, rest = parser.parse_known_args(flags)
    folder = Path(known.output_dir) / "data"
    parsed = _parse_run([*demo_flags(folder), "--output_dir", known.output_dir, *rest], "hf-slim demo")
    write_demo(folder)
    return parsed


def _parse_run(flags: list[str], prog: str) -> tuple[ModelArguments, DataArguments, SlimTrainingArguments]:
    from ..arguments import SlimTrainingArguments
    from .data import DataArguments
    from .run import ModelArguments

    return _parse(flags, prog, ModelArguments, DataArguments, SlimTrainingArguments)


def _parse(flags: list[str], prog: str, *kinds: type) -> Any:
    """The flags, or what a .json file holds of them, as an instance of each of the dataclasses."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(kinds, prog=prog)
    if len(flags) == 1 and flags[0].endswith(".json"):
        return parser.parse_json_file(flags[0])
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def _set_up_logging(arguments: SlimTrainingArguments) -> None:
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    transformers_logging.set_verbosity(arguments.get_process_log_level())
