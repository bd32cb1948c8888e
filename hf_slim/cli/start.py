"""The start of a command that trains: all before the first step, of which a mistake leaves nothing behind."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .answers import let_stderr_go

_PARTS = ("data", "dense", "slimmed")
"""What a command writes in its folder before a training is over."""


class Start(TrainerCallback):
    """What is done before the first step of a training: where that fails, what is new in the folder goes again.

    Args:
        output_dir: The folder, which need not exist.
    """

    def __init__(self, output_dir: str | Path) -> None:
        """See the class."""
        self._folder = Path(output_dir).absolute()
        self._known = {path for path in (self._folder, *self._folder.parents) if path.exists()}
        self._known |= {path for part in _PARTS for path in _list(self._folder / part)}
        self._is_over = False

    def __enter__(self) -> Start:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove what is new if it failed before it was over."""
        if kind is None or self._is_over:
            return
        with contextlib.suppress(OSError):  # what cannot be removed stays; the reason of the failure is what is told
            self._remove_new()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be over: a training takes its first step."""
        self.end()

    def end(self) -> None:
        """Be over: from now on what is written stays, and what is printed on stderr comes at once."""
        if not self._is_over:
            self._is_over = True
            let_stderr_go()

    def _remove_new(self) -> None:
        for part in _PARTS:
            for path in _list(self._folder / part):
                if path not in self._known and path.is_dir():
                    shutil.rmtree(path)
                elif path not in self._known:
                    path.unlink(missing_ok=True)
        for path in (self._folder, *self._folder.parents):
            if path not in self._known and path.exists():
                path.rmdir()


def _list(folder: Path) -> list[Path]:
    """A folder and what is in it, outer ones first; nothing where there is none."""
    return [folder, *folder.rglob("*")] if folder.is_dir() else []
