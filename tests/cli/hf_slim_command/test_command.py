"""The command as a process: what is on its streams, and with which status it ends."""

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import build

import hf_slim.cli.hf_slim_command.command as door
from hf_slim.cli import card as _card  # noqa: F401
from hf_slim.cli import main

DOOR = Path(door.__file__).parents[1]


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch):
    """Has `hf-slim card` do something else."""

    def set_work(work) -> None:
        monkeypatch.setattr("hf_slim.cli.card.renew_card", lambda folder: work())

    return set_work


@pytest.fixture
def chatty_libraries(capsys):
    """Their loggers print on stderr, as they do in a process of their own."""
    stream = sys.stderr
    handler = logging.StreamHandler(stream)
    logging.getLogger("transformers").addHandler(handler)
    yield
    assert handler.stream is stream
    logging.getLogger("transformers").removeHandler(handler)


def _chat(then=None):
    print("said on the way", file=sys.stderr)
    if then is not None:
        raise then
    return "README.md"


def test_weights_that_do_not_fit_are_named_in_the_only_line(tmp_path, chatty_libraries, capsys):
    build("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    capsys.readouterr()  # what was printed while it was saved
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr() == (
        "",
        f"hf-slim compare: error: {tmp_path} cannot be loaded as BertForSequenceClassification: "
        "bert.encoder.layer.0.intermediate.dense.bias is (64,) in its weights, and its config says (48,).\n",
    )


def test_what_is_said_on_the_way_is_printed_if_nothing_is_wrong(working, capsys):
    working(_chat)
    assert main(["card", "slim"]) == 0
    assert capsys.readouterr() == ("\nThe model card lies in README.md\n", "said on the way\n")


def test_what_is_said_before_a_bug_is_printed(working, capsys):
    working(lambda: _chat(AssertionError("a bug")))
    with pytest.raises(AssertionError, match="a bug"):
        main(["card", "slim"])
    assert capsys.readouterr().err == "said on the way\n"


def test_an_interrupted_command_says_so_in_a_line(working, capsys):
    working(lambda: _chat(KeyboardInterrupt()))
    assert main(["card", "slim"]) == 130
    assert capsys.readouterr().err == "hf-slim card: interrupted\n"


@pytest.mark.parametrize("length", [1, 100_000])  # found out when the buffer is written, or at once
@pytest.mark.parametrize("words", [["card", "slim"], ["--help"]])
def test_a_reader_that_has_gone_is_no_mistake(length, words, working, monkeypatch, capsys):
    working(lambda: "x" * length)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(words) == 141
    assert capsys.readouterr().err == ""


def test_the_versions_are_printed_without_an_import_of_pytorch():
    script = f"import sys; sys.path.insert(0, {str(DOOR)!r}); from hf_slim_command import main; main(['--version'])"
    script += "; assert not {'torch', 'transformers', 'hf_slim'} & set(sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == (
        f"hf-slim {version('hf-slim')} (torch {version('torch')}, transformers {version('transformers')})\n"
    )
