"""The door of the `hf-slim` command, which prints its usage without the seconds that importing PyTorch takes.

It is installed beside the package, since to import anything in the package is to import hf_slim with its hooks.
"""

from __future__ import annotations

import argparse


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
        "prune  your trained model in one shot, without training, calibrated on your data\n"
        "bench  times, FLOPs and peak memory of dense and slim models, as tables and a plot\n\n"
        "hf-slim run --help, and so on, list the flags. demo takes those of run and has a default for what it needs.",
    )
    parser.add_argument("command", choices=["demo", "run", "prune", "bench"])
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    chosen = parser.parse_args(argv)
    from hf_slim.cli.subcommands import run_command

    return run_command(chosen.command, chosen.flags)
