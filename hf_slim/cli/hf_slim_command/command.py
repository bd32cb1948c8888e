"""The command itself: typer reads the words, then the work is done, and mistakes are answered in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import typer

from .app import app
from .held_stream import holding_stderr
from .mistakes import is_mistake, print_mistake

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # not every typer exports the class itself
_INTERRUPTED, _BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the command's name; those of the process if not given.

    Returns:
        The exit status: 0, or 2 after a mistake, which is all that is on stderr, in one line; as of a process that a
        signal ends, 130 after Ctrl-C, and 141 where the reader of stdout has gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = f"hf-slim {words[0]}" if words and not words[0].startswith("-") else "hf-slim"
    streams = sys.stdout, sys.stderr
    with holding_stderr() as held:
        try:
            found = app(args=words, prog_name="hf-slim", standalone_mode=False)
            status = found() if callable(found) else int(found or 0)
            sys.stdout.flush()
        except KeyboardInterrupt:
            held.drop()
            print(f"{prog}: interrupted", file=sys.stderr)
            return _INTERRUPTED
        except BrokenPipeError:
            held.drop()
            return _give_up(*streams)
        except Exception as error:
            mistake = _find_mistake(prog, error)
            if mistake is None:
                held.release()
                raise
            held.drop()
            return print_mistake(*mistake)
        except SystemExit as error:
            held.release()
            if isinstance(error.__context__, BrokenPipeError):  # typer's answer to a reader that has gone
                return _give_up(*streams)
            raise
        held.release()
        return status


def _find_mistake(prog: str, error: Exception) -> tuple[str, object] | None:
    """The program and the message of a mistake; None for a bug."""
    if isinstance(error, _UsageError):
        usage: Any = error
        prog = usage.ctx.command_path if usage.ctx is not None else prog
        return prog, f"{usage.format_message()} See `{prog} --help`."
    return (prog, error) if is_mistake(error) else None


def _give_up(*streams: TextIO) -> int:
    """Print no more, since the reader of a pipe has gone, as `head` does; that is no mistake."""
    for stream in streams:
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return _BROKEN_PIPE
