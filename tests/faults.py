"""Kills a training or a save at many moments: `python tests/faults.py --kills 20 --saves 25`.

Moments are counted in calls of the Trainer and of hf_slim and in operations on files. `--kills` draws them from the
steps, the saving of checkpoints, and compaction and the saving of the slim model, by turns; at half of those that
save, the process does not die at once, but in the middle of writing the next large file. A run that is killed and
resumed has to end with the same masks, the same weights and the same slim model, bit for bit, and must not have lost a
checkpoint that was written. `--saves` kills `save_slimmed` over an older slim folder, which afterwards has to be
wholly the old model or wholly the new one, with all other files.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import inspect
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import build, half_masks
from tqdm.auto import tqdm
from trainers import make_trainer, slim_callback
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_slim import SlimTrainerCallback, find_structures
from hf_slim.compaction.zeros import zero_units
from hf_slim.saving import atomic_folder
from hf_slim.saving import save as saving
from hf_slim.training import callback, slimmer
from hf_slim.training.checkpoints import find_whole_checkpoint

COUNTED = (Trainer, SlimTrainerCallback, slimmer.Slimmer, callback, slimmer, saving, atomic_folder)
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")
PHASES = {"_save_checkpoint": "checkpoint", "save_slimmed": "slim model"}
TIMED = re.compile(rb"latency \(ms\)|^One forward pass|\"(milliseconds_(before|after)|machine)\":")
"""Lines of a card and a report that are never the same twice."""
SIZES = (3_000, 60_000)
"""The log of a run is smaller, and the weights of the slim model are larger."""


class Clock:
    """Counts moments, and kills the process at one of them.

    Args:
        deadline: The moment; None to count only.
        size: Die not at that moment, but as soon as a file would become larger than that many bytes.
    """

    def __init__(self, deadline: int | None = None, size: int | None = None) -> None:
        self.deadline, self.size, self.counts = deadline, size, False
        self.phase = "step"
        self.moments: list[str] = []

    def start(self) -> None:
        """Count from here on; there is no way to take an audit hook away."""
        self.counts = True
        sys.addaudithook(self._on_audit)

    def stop(self) -> list[str]:
        """End the count; what each moment was."""
        self.counts = False
        return self.moments

    def tick(self, label: str) -> None:
        """One moment more."""
        if not self.counts:
            return
        self.moments.append(label)
        if len(self.moments) - 1 == self.deadline:
            if self.size is None:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))

    def watch(self, owner: Any, name: str) -> None:
        """Count the beginning and the end of every call of a function."""
        function = vars(owner)[name]

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            outer, self.phase = self.phase, PHASES.get(name, self.phase)
            self.tick(self.phase)
            result = function(*args, **kwargs)
            self.tick(self.phase)
            self.phase = outer
            return result

        setattr(owner, name, counted)

    def _on_audit(self, event: str, arguments: tuple) -> None:
        if self.counts and event.startswith(FILE_EVENTS):
            self.tick(self.phase)


class SaveLog(TrainerCallback):
    """Writes down which checkpoints are there for certain."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args, state, control, **kwargs) -> None:
        """Append the step."""
        with (self.folder / "saved.txt").open("a") as file:
            print(state.global_step, file=file, flush=True)


def train(folder: Path, deadline: int | None = None, size: int | None = None, *, resume: bool = False) -> None:
    """Train to the end and save the slim model; write down what came out, and the phases of the moments."""
    clock = Clock(deadline, size)
    for owner in COUNTED:
        for name in [name for name, value in vars(owner).items() if inspect.isfunction(value)]:
            clock.watch(owner, name)
    # The first forward pass would write the type of problem into the config; one resumed at the end runs none.
    fields = {"hidden_dropout_prob": 0.1, "problem_type": "single_label_classification"}
    model = build("bert", spread=0.05, **fields).train()
    trainer = make_trainer(
        model,
        folder / "run",
        callbacks=[SaveLog(folder)],
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        full_determinism=True,
        use_cpu=True,
        gradient_accumulation_steps=2,
        slim_live=True,
    )
    checkpoint: bool | str = False
    if resume:
        try:
            checkpoint = find_whole_checkpoint(folder / "run") and True
        except ValueError:
            checkpoint = False  # killed before the first one was written
    clock.start()
    trainer.train(resume_from_checkpoint=checkpoint)
    saving.save_slimmed(trainer, folder / "run" / "slim")
    phases = clock.stop()
    result = {
        "weights": _hash(trainer.model.state_dict()),
        "masks": {name: mask.tolist() for name, mask in slim_callback(trainer).masks.items()},
        "slim": _hash(AutoModelForSequenceClassification.from_pretrained(folder / "run" / "slim").state_dict()),
        "files": digests(folder / "run" / "slim"),
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "phases.json").write_text(json.dumps(phases))


def save(folder: Path, seed: int, keep: float, deadline: int | None = None, size: int | None = None) -> None:
    """Save a tiny slim model in a folder's `slim`, and write down the moments."""
    model = build("bert", seed=seed)
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures, keep=lambda s: int(keep * s.units)))
    clock = Clock(deadline, size)
    exchange = atomic_folder._exchange

    def counted(new: Path, old: Path) -> None:
        clock.tick("before the exchange")
        exchange(new, old)
        clock.tick("after the exchange")

    atomic_folder._exchange = counted
    clock.phase = "file operation"
    clock.start()
    saving.save_slimmed(model, folder / "slim", max_shard_size="60KB" if keep < 0.5 else None)
    (folder / "moments.json").write_text(json.dumps(clock.stop()))


def describe(folder: Path) -> None:
    """Write down what the model in a folder's `slim` is: it loads, its config, and its weights."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder / "slim", output_loading_info=True)
    if any(report.values()):
        raise ValueError(f"The slim model does not load cleanly: {report}")
    config = AutoConfig.from_pretrained(folder / "slim").to_dict()
    del config["_name_or_path"]
    (folder / "model.json").write_text(json.dumps({"weights": _hash(model.state_dict()), "config": config}))


def add_others(folder: Path) -> dict[str, str]:
    """Other files beside a slim model: one, one in a checkpoint, one of a model's name in it, and a link."""
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("weights of the checkpoint")
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{\n}\n")
    (folder / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("notes.txt")
    return {name: digest for name, digest in digests(folder).items() if name[:4] in ("chec", "note", "link")}


def digests(folder: Path) -> dict[str, str]:
    """The contents of all files in a folder, but for what was timed, and where its links lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"to {os.readlink(path)}"
        elif path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            if path.name in ("README.md", "slim_report.json"):
                lines = [line for line in lines if not TIMED.search(line)]
            found[str(path.relative_to(folder))] = hashlib.sha256(b"".join(lines)).hexdigest()
    return found


def in_new_process(function: Callable[[], None], log: Path) -> int:
    """Run a function in a process of its own, forked from this one, which has imported everything and run nothing."""
    gc.freeze()  # or every collection in the new one goes through all that was imported
    child = os.fork()
    if child == 0:
        status = 1
        with log.open("ab") as file, open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def must_work(function: Callable[[], None], log: Path) -> None:
    """Run in a new process what is not killed."""
    if in_new_process(function, log) != 0:
        raise RuntimeError(f"What is not killed fails:\n{log.read_text()}")


def choose_moments(phases: list[str], kills: int, seed: int) -> list[tuple[int, int | None]]:
    """Random moments, by turns in each phase; every other one in a phase that writes is one of its next large file."""
    generator = random.Random(seed)
    kinds = sorted(set(phases))
    chosen = []
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        writes = kind != "step" and number // len(kinds) % 2 == 1
        moments = [n for n, phase in enumerate(phases) if phase == kind]
        # A large file is yet to come in the first quarter of a phase; at its end all are written.
        moment = generator.choice(moments[: len(moments) // 4] if writes else moments)
        size = int(SIZES[0] * (SIZES[1] / SIZES[0]) ** generator.random())
        chosen.append((moment, size if writes else None))
    return chosen


def run(kills: int, seed: int) -> list[tuple[str, str]]:
    """Kill a training and resume it that many times.

    Returns:
        For each kill its moment in words, and what was wrong (nothing, if all is well).
    """
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = [Path(scratch) / name for name in ("first", "second")]
        for folder in whole:  # the second one finds everything compiled and imports as those after it
            folder.mkdir()
            must_work(functools.partial(train, folder), folder / "log.txt")
        first, expected = (json.loads((folder / "result.json").read_text()) for folder in whole)
        if first != expected:
            raise RuntimeError("Two trainings that are not killed end differently, so nothing can be compared.")
        phases = json.loads((whole[1] / "phases.json").read_text())
        for number, (moment, size) in enumerate(tqdm(choose_moments(phases, kills, seed), desc="kills")):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            problem = _kill_and_resume(folder, moment, size, expected)
            found.append((_words(moment, len(phases), phases[moment], size), problem))
    return found


def run_saves(kills: int) -> list[tuple[str, str]]:
    """Kill a save over an older slim folder that many times.

    Returns:
        For each kill its moment in words, and what was wrong (nothing, if all is well).
    """
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, prepared, log = (Path(scratch) / name for name in ("whole", "prepared", "log.txt"))
        folder.mkdir()
        must_work(lambda: save(folder, 0, 0.25), log)
        must_work(lambda: describe(folder), log)
        old = json.loads((folder / "model.json").read_text())
        old_files = digests(folder / "slim")
        others = add_others(folder / "slim")
        shutil.copytree(folder / "slim", prepared, symlinks=True)
        must_work(lambda: save(folder, 1, 0.5), log)
        must_work(lambda: describe(folder), log)
        new = json.loads((folder / "model.json").read_text())
        new_files = {name: digest for name, digest in digests(folder / "slim").items() if name not in others}
        moments = json.loads((folder / "moments.json").read_text())
        if old == new or not others.items() <= digests(folder / "slim").items():
            raise RuntimeError("The save that is not killed does not do what it should.")
        ends = {"old": (old, old_files), "new": (new, new_files)}
        for moment, size in tqdm(choose_saves(moments, kills), desc="saves"):
            folder = Path(scratch) / f"{moment}-{size}"
            shutil.copytree(prepared, folder / "slim", symlinks=True)
            status = in_new_process(functools.partial(save, folder, 1, 0.5, moment, size), log)
            problem = f"it was not killed, but ended with {status}"
            if status == (-signal.SIGKILL if size is None else -signal.SIGXFSZ):
                problem = _check_folder(folder, log, ends, others)
            found.append((_words(moment, len(moments), moments[moment], size), problem))
    return found


def choose_saves(moments: list[str], kills: int) -> list[tuple[int, int | None]]:
    """Five sizes, at which a file is cut off, the exchange with three operations on each side, and an even spread."""
    exchange = moments.index("before the exchange")
    near = range(exchange - 3, exchange + 5)
    sizes = (0, 700, 3_000, 20_000, 100_000)
    others = [n for n in range(len(moments)) if n not in near]
    even = kills - len(sizes) - len(near)
    spread = [others[n * (len(others) - 1) // (even - 1)] for n in range(even)]
    return [*((0, size) for size in sizes), *((moment, None) for moment in sorted((*near, *spread)))]


def _check_folder(folder: Path, log: Path, ends: dict[str, tuple[dict, dict]], others: dict[str, str]) -> str:
    files = digests(folder / "slim")
    if not others.items() <= files.items():
        return f"other files are lost or changed: {sorted(others.items() - files.items())}"
    if in_new_process(lambda: describe(folder), log) != 0:
        return f"it does not load:\n{log.read_text()}"
    model = json.loads((folder / "model.json").read_text())
    files = {name: digest for name, digest in files.items() if name not in others}
    if (model, files) not in ends.values():
        return f"it is neither the old nor the new model: {sorted(files)}"
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".slim.")} - {"slim", "model.json"}
    return f"left behind: {left}" if left else ""


def _kill_and_resume(folder: Path, moment: int, size: int | None, expected: dict) -> str:
    log = folder / "log.txt"
    status = in_new_process(lambda: train(folder, moment, size), log)
    if status != (-signal.SIGKILL if size is None else -signal.SIGXFSZ):
        return f"it was not killed, but ended with {status}:\n{log.read_text()}"
    saved = folder / "saved.txt"
    last = int(saved.read_text().split()[-1]) if saved.exists() else 0
    if last and int(find_whole_checkpoint(folder / "run").rpartition("-")[2]) < last:
        return f"checkpoint {last} is lost"
    slim = folder / "run" / "slim"
    if slim.exists() and digests(slim) != expected["files"]:
        return "the slim folder is not whole"
    if in_new_process(lambda: train(folder, resume=True), log) != 0:
        return f"resuming failed:\n{log.read_text()}"
    actual = json.loads((folder / "result.json").read_text())
    return ", ".join(f"other {key}" for key in expected if actual[key] != expected[key])


def _words(moment: int, moments: int, phase: str, size: int | None) -> str:
    how = "" if size is None else f", at byte {size} of the next file that is larger"
    return f"killed at moment {moment:5} of {moments} ({phase}{how})"


def _hash(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="trainings to kill")
    parser.add_argument("--saves", type=int, default=0, help="saves over an older folder to kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for results, means in (
        (run(options.kills, options.seed) if options.kills else [], "end bit-equal, none lost a checkpoint"),
        (run_saves(options.saves) if options.saves else [], "leave the old folder or the new one, whole"),
    ):
        for words, problem in results:
            print(f"{words}: {problem or 'good'}")
        if results:
            print(f"{sum(not problem for _, problem in results)} of {len(results)} {means}")
        good &= not any(problem for _, problem in results)
    sys.exit(not good)
