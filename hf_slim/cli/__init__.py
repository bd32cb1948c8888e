"""The `hf-slim` command: a file for each subcommand, imported when it is run, so that the usage is printed at once."""

from .hf_slim_command import main
