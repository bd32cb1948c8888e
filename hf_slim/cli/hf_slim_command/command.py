"""The command itself: typer reads the words, then the work is done, and mistakes are answered in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from .app import app
from .mistakes import is_mistake, print_mistake

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # not every typer exports the class itself


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name; those of the process if not given.

    Returns:
        The exit status: 0, or 2 after a mistake, which is named in one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        found = app(args=words, prog_name="hf-slim", standalone_mode=False)
        return found() if callable(found) else int(found or 0)
    except Exception as error:
        if isinstance(error, _UsageError):
            usage: Any = error
            prog = usage.ctx.command_path if usage.ctx is not None else f"hf-slim {words[0]}"
            return print_mistake(prog, f"{usage.format_message()} See `{prog} --help`.")
        if is_mistake(error):
            return print_mistake(f"hf-slim {words[0]}", error)
        raise
