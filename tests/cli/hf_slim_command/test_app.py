"""The subcommands, their usage, and what a shell completes."""

import re

import pytest
import typer
from commands import refuse
from typer.testing import CliRunner

from hf_slim.arguments import SlimConfig
from hf_slim.cli import main
from hf_slim.cli.data import DataArguments
from hf_slim.cli.hf_slim_command.app import app
from hf_slim.cli.model_comparison import CompareArguments


def _complete(words: str, number: int) -> list[str]:
    environment = {"_HF_SLIM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    return CliRunner().invoke(app, prog_name="hf-slim", env=environment).output.split()


def test_every_subcommand_is_listed_with_a_line_that_is_not_cut():
    lines = CliRunner().invoke(app, ["--help"], prog_name="hf-slim").output.splitlines()
    commands = lines[lines.index("Commands:") + 1 :]
    listed = [line.split()[0] for line in commands if line.startswith("  ") and not line.startswith("   ")]
    assert {"demo", "run", "prune", "compact", "push", "card", "bench"} <= set(listed)
    assert len(lines) <= 50 and "..." not in "".join(commands)


@pytest.mark.parametrize(
    ("words", "number", "completed"),
    [
        ("hf-slim pu", 1, ["push"]),
        ("hf-slim run --slim_te", 2, ["--slim_teacher", "--slim_temperature", "--slim_teacher_dtype"]),
        ("hf-slim prune --model_name_or_path m --num", 4, ["--num_calibration_samples"]),
        ("hf-slim push a b --rev", 4, ["--revision"]),
    ],
)
def test_a_shell_completes_commands_and_flags(words, number, completed):
    assert _complete(words, number) == completed


def test_completion_can_be_installed():
    names = [name for option in typer.main.get_command(app).params for name in option.opts]
    assert {"--install-completion", "--show-completion"} <= set(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"Missing command\. See `hf-slim --help`\."),
        (["brun"], r"No such command 'brun'\. Did you mean 'run'.*\? See `hf-slim --help`\."),
        (["push", "a"], r"Missing argument 'REPO'\. See `hf-slim push --help`\."),
        (["push", "a", "b", "--token"], r"Option '--token' requires an argument\. See `hf-slim push --help`\."),
        (["card", "a", "b"], r"Got unexpected extra argument.* \(b\) See `hf-slim card --help`\."),
    ],
)
def test_usage_is_answered_in_one_line(words, message):
    assert re.fullmatch(message, refuse(*words))


def test_an_unknown_option_is_answered_with_the_nearest():
    message = refuse("compact", "a", "b", "--jsn")
    assert message.startswith("No such option: --jsn") and "--json" in message


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_what_is_not_given_is_left_to_the_dataclass(command, monkeypatch):
    given = {}
    monkeypatch.setattr("hf_slim.cli.hf_slim_command.app._later", lambda *_, **flags: lambda: given.update(flags) or 0)
    models = {"model": "a"} if command == "inspect" else {"model": "a", "other": "b"}
    assert main([command, *models.values()]) == 0
    assert given == models


def test_help_names_the_defaults():
    pages = {name: CliRunner().invoke(app, [name, "--help"]).output.split() for name in ("inspect", "compare")}
    texts = {name: " ".join(words) for name, words in pages.items()}
    assert f"channels of a layer; default: {SlimConfig.slim_round_to}." in texts["inspect"]
    assert f"every layer keeps; default: {SlimConfig.slim_min_heads}." in texts["inspect"]
    assert f"of a sequence; default: {DataArguments.max_seq_length}." in texts["compare"]
    assert f"of a forward pass; default: {CompareArguments.batch_size}." in texts["compare"]
