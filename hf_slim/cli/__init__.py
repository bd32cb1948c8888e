"""The `hf-slim` command: a file for each subcommand, imported with it, so that the usage is printed at once."""

from .command import main
