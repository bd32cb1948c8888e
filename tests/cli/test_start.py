"""What fails before the first step of a training leaves its folder as it was."""

import sys

import pytest
from transformers import TrainerControl, TrainerState

from hf_slim.cli.start import Start


def _write(folder) -> None:
    for name in ("dense/runs/events", "slimmed/checkpoint-1/weights", "data/train.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("new")


def _fail(folder, end=lambda start: None) -> None:
    with pytest.raises(ValueError, match="a mistake"), Start(folder) as start:
        end(start)
        _write(folder)
        raise ValueError("a mistake")


def test_a_new_folder_goes_with_those_around_it(tmp_path):
    _fail(tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path):
    (tmp_path / "slimmed" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "slimmed" / "checkpoint-9" / "weights").write_text("old")
    (tmp_path / "data").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    _fail(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "slimmed" / "checkpoint-9" / "weights").read_text() == "old"


def test_after_the_first_step_all_stays(tmp_path):
    _fail(tmp_path, lambda start: start.on_step_begin(None, TrainerState(), TrainerControl()))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3


def test_what_does_not_fail_leaves_all(tmp_path):
    with Start(tmp_path):
        _write(tmp_path)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3


def test_the_first_step_lets_stderr_go(tmp_path, monkeypatch):
    class Stream:
        released = 0

        def release(self) -> None:
            self.released += 1

    monkeypatch.setattr(sys, "stderr", Stream())
    start = Start(tmp_path)
    start.end()
    start.end()
    assert sys.stderr.released == 1
