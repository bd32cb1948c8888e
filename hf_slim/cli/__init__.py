"""The subcommands of `hf-slim`, a file for each; the command itself is in hf_slim_command.py, beside the package."""

from hf_slim_command import main

__all__ = [
    "main",
]
