"""The command, called in this process."""

import contextlib
import io
import json
from pathlib import Path

from hf_slim.cli import main, subcommands  # noqa: F401


def run(*flags: str) -> tuple[dict, str]:
    """What `hf-slim run` measures, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["run", *flags]) == 0
    figures = json.loads((Path(flags[flags.index("--output_dir") + 1]) / "comparison.json").read_text())
    return figures, printed.getvalue()


def refuse(*words: object) -> str:
    """The one line with which a command is refused, which is all on stderr, without the name of the program."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in words]) == 2
    lines = errors.getvalue().splitlines()
    assert len(lines) == 1 and printed.getvalue().count("error") == 0
    command, error, message = lines[0].partition(": error: ")
    assert error and command in ("hf-slim", f"hf-slim {words[0] if words else ''}")
    return message
