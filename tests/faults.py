"""Kills a training at random moments, resumes it, and compares the end: `python tests/faults.py --kills 20`.

The moments are counted in function calls of the Trainer and of hf_slim and in operations on files, so that they fall
into steps, into the saving of checkpoints, and into compaction and the saving of the slim model, by turns. A run that
is killed and resumed has to end with the same masks, the same weights and the same slim model, bit for bit, and must
not have lost a checkpoint that was written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from conftest import build
from test_callback import make_trainer, slim_callback
from tqdm.auto import tqdm
from transformers import TrainerCallback

import hf_slim
from hf_slim import save_slimmed
from hf_slim.checkpoints import find_whole_checkpoint

COUNTED = (str(Path(hf_slim.__file__).parent), str(Path(transformers.__file__).parent / "trainer"))
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")
PHASES = {"_save_checkpoint": "checkpoint", "save_slimmed": "slim model"}


class Clock:
    """Counts moments, and kills the process at one of them."""

    def __init__(self, deadline: int | None = None, record: Path | None = None) -> None:
        self.now, self.deadline, self.record = 0, deadline, record
        self.phases: list[str] = []
        self.phase = "step"
        sys.addaudithook(self._on_audit)
        sys.setprofile(self._on_call)

    def tick(self) -> None:
        """One moment more."""
        self.now += 1
        self.phases.append(self.phase)
        if self.now - 1 == self.deadline:
            os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> list[str]:
        """End the count; the phase of each moment."""
        sys.setprofile(None)
        self.deadline = None
        return self.phases

    def _on_audit(self, event: str, arguments: tuple) -> None:
        if event.startswith(FILE_EVENTS):
            self.tick()

    def _on_call(self, frame, event: str, argument: object) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(COUNTED):
            if frame.f_code.co_name in PHASES:
                self.phase = PHASES[frame.f_code.co_name] if event == "call" else "step"
            self.tick()


class SaveLog(TrainerCallback):
    """Writes down which checkpoints are there for certain."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args, state, control, **kwargs) -> None:
        """Append the step."""
        with (self.folder / "saved.txt").open("a") as file:
            print(state.global_step, file=file, flush=True)


def train(folder: Path, deadline: int | None = None, *, resume: bool = False) -> None:
    """Train to the end and save the slim model; write down what came out, and the phases of the moments."""
    model = build("bert", spread=0.05, hidden_dropout_prob=0.1).train()
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
    )
    clock = Clock(deadline)
    checkpoint: bool | str = False
    if resume:
        try:
            checkpoint = find_whole_checkpoint(folder / "run") and True
        except ValueError:
            checkpoint = False  # killed before the first one was written
    trainer.train(resume_from_checkpoint=checkpoint)
    save_slimmed(trainer, folder / "run" / "slim")
    phases = clock.stop()
    result = {
        "weights": _hash(trainer.model.state_dict()),
        "masks": {name: mask.tolist() for name, mask in slim_callback(trainer).masks.items()},
        "slim": _hash(
            transformers.AutoModelForSequenceClassification.from_pretrained(folder / "run" / "slim").state_dict()
        ),
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "phases.json").write_text(json.dumps(phases))


def in_new_process(function: Callable[[], None], log: Path) -> int:
    """Run a function in a process of its own, forked from this one, which has imported everything and run nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
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


def choose_moments(phases: list[str], kills: int, seed: int) -> list[int]:
    """Random moments, by turns in each phase."""
    generator = random.Random(seed)
    kinds = sorted(set(phases))
    moments = []
    for number in range(kills):
        kind = kinds[number % len(kinds)]
        moments.append(generator.choice([n for n, phase in enumerate(phases) if phase == kind]))
    return moments


def run(kills: int, seed: int) -> list[tuple[int, str, str]]:
    """Kill and resume that many times.

    Returns:
        For each kill the moment, its phase, and what was wrong (nothing, if all is well).
    """
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        if in_new_process(lambda: train(whole), whole / "log.txt") != 0:
            raise RuntimeError(f"The training that is not killed fails:\n{(whole / 'log.txt').read_text()}")
        phases = json.loads((whole / "phases.json").read_text())
        expected = json.loads((whole / "result.json").read_text())
        for number, moment in enumerate(tqdm(choose_moments(phases, kills, seed), desc="kills")):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            found.append((moment, phases[moment], _kill_and_resume(folder, moment, expected)))
    return found


def _kill_and_resume(folder: Path, moment: int, expected: dict) -> str:
    log = folder / "log.txt"
    status = in_new_process(lambda: train(folder, moment), log)
    if status != -signal.SIGKILL:
        return f"it was not killed, but ended with {status}:\n{log.read_text()}"
    saved = folder / "saved.txt"
    last = int(saved.read_text().split()[-1]) if saved.exists() else 0
    if last and int(find_whole_checkpoint(folder / "run").rpartition("-")[2]) < last:
        return f"checkpoint {last} is lost"
    slim = folder / "run" / "slim"
    if slim.exists():
        transformers.AutoConfig.from_pretrained(slim)
        if not (slim / "model.safetensors").exists():
            return "the slim folder is not whole"
    if in_new_process(lambda: train(folder, resume=True), log) != 0:
        return f"resuming failed:\n{log.read_text()}"
    actual = json.loads((folder / "result.json").read_text())
    return ", ".join(f"other {key}" for key in expected if actual[key] != expected[key])


def _hash(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = run(options.kills, options.seed)
    for moment, phase, problem in results:
        print(f"killed at moment {moment:6} ({phase}): {problem or 'bit-equal'}")
    good = sum(not problem for *_, problem in results)
    print(
        f"{good} of {len(results)} end bit-equal, none lost a checkpoint" if good == len(results) else f"{good} good"
    )
    sys.exit(good != len(results))
