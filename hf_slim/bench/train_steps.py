"""What training costs: single optimizer steps of every kind, and whole runs of the Trainer."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from ..arguments import SlimConfig, place_steps
from ..saving import time_alternately, time_call, wait_for
from ..training import Schedule, Slimmer, SlimTrainerCallback
from .flags import BenchArguments
from .shapes import Case, build_model, count_flops, make_batch, slim_settings

PRUNING_STEPS = 13
"""How many there are with the default settings in a long training."""
_FAR = 10**6
_RATE = 1e-5
_EVERY_STEP: dict[str, Any] = {"slim_start": 2, "slim_end": PRUNING_STEPS + 1, "slim_frequency": 1}
_AT_ONCE: dict[str, Any] = {"slim_start": 1, "slim_end": 1, "slim_schedule": "oneshot"}
_RUN: dict[str, Any] = {"slim_start": 0.05, "slim_end": 0.5, "slim_frequency": 0.02}


class TrainStep:
    """One optimizer step as the Trainer takes it, with what the callback adds.

    Args:
        model: The model.
        optimizer: Its optimizer.
        batch: The inputs, with labels.
        slimming: The masks and scores; None for a plain step.

    Attributes:
        extra: For every step taken the seconds that slimming took.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Mapping[str, torch.Tensor],
        slimming: Slimmer | None = None,
    ) -> None:
        """See the class."""
        self.model, self.optimizer, self.batch, self.slimming = model, optimizer, batch, slimming
        self.extra: list[float] = []
        self._device = batch["input_ids"].device

    def __call__(self) -> None:
        """Take the step."""
        step = len(self.extra) + 1
        slimming = self.slimming
        if slimming is not None:
            slimming.watch(self.model, step)
        self.model.train()
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if slimming is None:
            self.optimizer.step()
            self.extra.append(0.0)
        else:
            is_scored = not slimming.has_reached_target
            extra = 0.0
            if is_scored:
                extra = self._time(lambda: slimming.score(self.model, step, may_be_skipped=False))
            self.optimizer.step()
            extra += self._time(lambda: slimming.advance(self.model, self.optimizer, step, skipped=not is_scored))
            self.extra.append(extra)
        self.optimizer.zero_grad()

    def _time(self, call: Callable[[], Any]) -> float:
        return time_call(call, self._device)


def make_steps(
    case: Case, batch_size: int, length: int, arguments: BenchArguments, kinds: tuple[str, ...]
) -> dict[str, TrainStep]:
    """Make train steps of several kinds.

    `plain`, `scoring` (before the first pruning step), `pruning` (every step but the first drops units, until the
    target is reached) and `masked` (after the last pruning step) share one dense model and its optimizer, so that they
    differ in nothing else; zeros do not change how long a matrix product takes. `pruning live` removes the units at
    once from a model of its own, and proves it on the batch; `live` trains a model from which they have been removed.

    Args:
        case: The case.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        arguments: The flags.
        kinds: Those that are wanted.

    Returns:
        The steps by kind.
    """
    batch = make_batch(case.config, batch_size, length, arguments.torch_device)
    steps: dict[str, TrainStep] = {}
    if set(kinds) - {"live", "pruning live"}:
        model = build_model(case.config, arguments)
        optimizer = _make_optimizer(model)
        settings: dict[str, dict[str, Any]] = {
            "scoring": {"slim_start": _FAR - 1, "slim_end": _FAR},
            "pruning": _EVERY_STEP,
            "masked": _AT_ONCE,
        }
        for kind in ("plain", "scoring", "pruning", "masked"):
            if kind in kinds:
                slimming = None
                if kind != "plain":
                    slimming = Slimmer(model, _settings(case, False, **settings[kind]), _FAR, optimizer=optimizer)
                steps[kind] = TrainStep(model, optimizer, batch, slimming)
    for kind, changes in (("pruning live", _EVERY_STEP), ("live", _AT_ONCE)):
        if kind in kinds:
            model = build_model(case.config, arguments)
            optimizer = _make_optimizer(model)
            slimming = Slimmer(model, _settings(case, True, **changes), _FAR, optimizer=optimizer)
            steps[kind] = TrainStep(model, optimizer, batch, slimming)
    return steps


def measure_train(case: Case, batch_size: int, length: int, arguments: BenchArguments) -> Iterator[dict[str, Any]]:
    """Time train steps of every kind, alternately.

    Args:
        case: The case.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        arguments: The flags.

    Yields:
        For each kind the median milliseconds, the median ratio to the plain step of the same round, and how much of it
        the work of slimming itself takes: as a fraction of the plain step, the median and the most.
    """
    flops = count_flops(case.config, batch_size, length, backward=True)
    slim_flops = count_flops(case.slim_config, batch_size, length, backward=True)
    phases = (
        (("plain", "scoring", "masked", "live"), arguments.repeats, 3),
        (("plain", "pruning", "pruning live"), PRUNING_STEPS, 1),
    )
    for kinds, rounds, warm_up in phases:
        steps = make_steps(case, batch_size, length, arguments, kinds)
        device = arguments.torch_device
        times = time_alternately(steps, repeats=rounds, device=device, desc="Train steps", warm_up=warm_up)
        plain = statistics.median(times["plain"])
        for kind, seconds in times.items():
            if kind == "plain" and "pruning" in kinds:
                continue  # there is one from the first phase
            extra = [value / plain for value in steps[kind].extra[-rounds:]]
            ratio = statistics.median(time / base for time, base in zip(seconds, times["plain"], strict=True))
            ideal = flops / slim_flops if kind == "live" else None
            yield {
                **case.to_record(batch_size, length),
                "step": kind,
                "ms": 1000 * statistics.median(seconds),
                "against_plain": ratio,
                "extra_ms": 1000 * plain * statistics.median(extra),
                "extra": statistics.median(extra),
                "extra_most": max(extra),
                "speed_up": 1 / ratio,
                "ideal": ideal,
                "fraction": ideal and 1 / ratio / ideal,
            }
        del steps


def measure_run(case: Case, batch_size: int, length: int, arguments: BenchArguments) -> Iterator[dict[str, Any]]:
    """Time whole fine-tuning runs of the Trainer, dense and slim in turn: dense, slim, slim, dense, and so on.

    Args:
        case: The case.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        arguments: The flags.

    Yields:
        One record: median seconds of each, their ratio, and the ratio that the counted operations of the steps give.
    """
    _time_run(case, batch_size, length, arguments, slim=False, steps=2)  # what only the first run does
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(arguments.run_repeats):
        for slim in (False, True) if number % 2 == 0 else (True, False):
            seconds[slim].append(_time_run(case, batch_size, length, arguments, slim, arguments.run_steps))
    dense, slim_run = (statistics.median(seconds[slim]) for slim in (False, True))
    ideal = _ideal_run(case, batch_size, length, arguments.run_steps)
    yield {
        **case.to_record(batch_size, length),
        "steps": arguments.run_steps,
        "dense_s": dense,
        "slim_s": slim_run,
        "speed_up": dense / slim_run,
        "ideal": ideal,
        "fraction": dense / slim_run / ideal,
    }


def _time_run(case: Case, batch_size: int, length: int, arguments: BenchArguments, slim: bool, steps: int) -> float:
    batch = make_batch(case.config, batch_size * steps, length, torch.device("cpu"))
    rows = [{name: values[i] for name, values in batch.items()} for i in range(batch_size * steps)]
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=_RATE,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=arguments.device == "cpu",
            dataloader_pin_memory=False,
        )
        callbacks = [SlimTrainerCallback(_settings(case, True, **_RUN))] if slim else []
        trainer = Trainer(build_model(case.config, arguments), training, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        wait_for(arguments.torch_device)
        start = time.perf_counter()
        trainer.train()
        wait_for(arguments.torch_device)
        return time.perf_counter() - start


def _ideal_run(case: Case, batch_size: int, length: int, steps: int) -> float:
    """The operations of a dense run over those of a live one, which at each step are in proportion to its sparsity."""
    flops = count_flops(case.config, batch_size, length)
    saved = flops - count_flops(case.slim_config, batch_size, length)
    settings = SlimConfig(**_RUN)
    schedule = Schedule(place_steps(settings, steps), 1.0, settings.slim_schedule)
    return flops * steps / sum(flops - saved * schedule.sparsity_at(step) for step in range(steps))


def _settings(case: Case, live: bool, **changes: Any) -> SlimConfig:
    """The settings of a case, masked or live."""
    return slim_settings(case.sparsity, **changes, slim_live=live)


def _make_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=_RATE)
