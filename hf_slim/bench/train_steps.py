"""What training costs: single optimizer steps of every kind, and whole runs of the Trainer."""

from __future__ import annotations

import functools
import operator
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from ..arguments import SlimConfig, place_steps
from ..costs import time_alternately, time_call
from ..distillation import Distiller
from ..training import Schedule, Slimmer, SlimTrainerCallback
from .shapes import Case

PRUNING_STEPS = 13
"""How many there are with the default settings in a long training."""
_FAR = 10**6
_RATE = 1e-5
_NEVER = {"slim_start": _FAR - 1, "slim_end": _FAR}
_EVERY_STEP = {"slim_start": 2, "slim_end": PRUNING_STEPS + 1, "slim_frequency": 1}
_AT_ONCE = {"slim_start": 1, "slim_end": 1, "slim_schedule": "oneshot"}
STEPS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "teacher": None,
    "scoring": _NEVER,
    "scoring snip": {**_NEVER, "slim_criterion": "snip_momentum"},
    "scoring fisher": {**_NEVER, "slim_criterion": "fisher"},
    "pruning": _EVERY_STEP,
    "pruning live": _EVERY_STEP,
    "masked": _AT_ONCE,
    "live": _AT_ONCE,
}
"""For each kind of train step the settings that make every step of that kind."""
_RUN: dict[str, Any] = {"slim_start": 0.05, "slim_end": 0.5, "slim_frequency": 0.02}


class TrainStep:
    """One optimizer step as the Trainer takes it, with what the callback adds.

    Args:
        model: The model.
        optimizer: Its optimizer.
        batch: The inputs, with labels.
        slimming: The masks and scores; None for a plain step.
        distiller: The teacher and what is compared; None for a step without one.

    Attributes:
        extra: For every step taken the seconds that slimming took.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Mapping[str, torch.Tensor],
        slimming: Slimmer | None = None,
        distiller: Distiller | None = None,
    ) -> None:
        """See the class."""
        self.model, self.optimizer, self.batch, self.slimming = model, optimizer, batch, slimming
        self.distiller = distiller
        self.extra: list[float] = []

    def __call__(self) -> None:
        """Take the step."""
        step, slimming = len(self.extra) + 1, self.slimming
        if slimming is not None:
            slimming.watch(self.model, step)
        self.model.train()
        self._compute_loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        extra, is_scored = 0.0, slimming is not None and not slimming.has_reached_target
        if slimming is not None and is_scored:
            extra += self._time(lambda: slimming.score(self.model, step, may_be_skipped=False))
        self.optimizer.step()
        if slimming is not None:
            extra += self._time(lambda: slimming.advance(self.model, self.optimizer, step, skipped=not is_scored))
        self.extra.append(extra)
        self.optimizer.zero_grad()

    def _compute_loss(self) -> torch.Tensor:
        if self.distiller is None:
            return self.model(**self.batch).loss
        with self.distiller.watch() as calls:
            loss = self.model(**self.batch).loss
        return self.distiller.combine(loss, self.distiller.measure(calls))

    def _time(self, call: Callable[[], Any]) -> float:
        return time_call(call, self.batch["input_ids"].device)


def make_steps(case: Case, kinds: Iterable[str]) -> dict[str, TrainStep]:
    """Make train steps of several kinds.

    `plain`, `teacher` (as plain, but the model learns from a copy of it), `scoring` (before the first pruning step,
    by the default criterion), `scoring snip` and `scoring fisher` (by `snip_momentum`, and by what budgets go by),
    `pruning` (every step but the first drops units, until the target is reached) and `masked` (after the last pruning
    step) share one dense model and its optimizer, so that they differ in nothing else; zeros do not change how long a
    matrix product takes. `pruning live` removes the units at once from a model of its own, and proves it on the batch;
    `live` trains a model from which they have been removed.

    Args:
        case: The case, with the size of its batches.
        kinds: Those that are wanted.

    Returns:
        The steps by kind.
    """
    batch = case.make_batch()
    steps: dict[str, TrainStep] = {}
    shared = functools.cache(lambda: _build(case))
    for kind in kinds:
        is_live = kind.endswith("live")
        model, optimizer = _build(case) if is_live else shared()
        changes = STEPS[kind]
        slimming = distiller = None
        if kind == "teacher":
            distiller = Distiller(case.build(), model, SlimConfig())
        if changes is not None:
            slimming = Slimmer(model, case.settings(**changes, slim_live=is_live), _FAR, optimizer=optimizer)
        steps[kind] = TrainStep(model, optimizer, batch, slimming, distiller)
    return steps


def _build(case: Case) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    model = case.build()
    return model, torch.optim.AdamW(model.parameters(), lr=_RATE)


def measure_train(case: Case) -> Iterator[dict[str, Any]]:
    """Time train steps of every kind, alternately.

    Args:
        case: The case, with the size of its batches.

    Yields:
        For each kind the median milliseconds, the median ratio to the plain step of the same round, and how much of it
        the work of slimming itself takes: as a fraction of the plain step, the median and the most.
    """
    ideal_live = case.count_flops(backward=True) / case.count_flops(slim=True, backward=True)
    phases = (
        (
            ("plain", "teacher", "scoring", "scoring snip", "scoring fisher", "masked", "live"),
            case.arguments.repeats,
            3,
        ),
        (("plain", "pruning", "pruning live"), PRUNING_STEPS, 1),
    )
    for kinds, rounds, warm_up in phases:
        steps = make_steps(case, kinds)
        times = time_alternately(steps, repeats=rounds, device=case.device, desc="Train steps", warm_up=warm_up)
        plain = statistics.median(times["plain"])
        for kind in kinds if kinds is phases[0][0] else kinds[1:]:  # a plain step is told once
            extra = [value / plain for value in steps[kind].extra[-rounds:]]
            ratio = statistics.median(map(operator.truediv, times[kind], times["plain"]))
            ideal = ideal_live if kind == "live" else None
            yield {
                **case.to_record(),
                "step": kind,
                "ms": 1000 * statistics.median(times[kind]),
                "against_plain": ratio,
                "extra_ms": 1000 * plain * statistics.median(extra),
                "extra": statistics.median(extra),
                "extra_most": max(extra),
                "speed_up": 1 / ratio,
                "ideal": ideal,
                "fraction": ideal and 1 / ratio / ideal,
            }
        del steps


def measure_run(case: Case) -> Iterator[dict[str, Any]]:
    """Time whole fine-tuning runs of the Trainer, dense and slim in turn: dense, slim, slim, dense, and so on.

    Args:
        case: The case, with the size of its batches.

    Yields:
        One record: median seconds of each, their ratio, and the ratio that the counted operations of the steps give.
    """
    steps = case.arguments.run_steps
    _time_run(case, slim=False, steps=2)  # what only the first run does
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(case.arguments.run_repeats):
        for slim in (False, True) if number % 2 == 0 else (True, False):
            seconds[slim].append(_time_run(case, slim=slim, steps=steps))
    dense, slim_run = (statistics.median(seconds[slim]) for slim in (False, True))
    ideal = _ideal_run(case)
    yield {
        **case.to_record(),
        "steps": steps,
        "dense_s": dense,
        "slim_s": slim_run,
        "speed_up": dense / slim_run,
        "ideal": ideal,
        "fraction": dense / slim_run / ideal,
    }


def _time_run(case: Case, *, slim: bool, steps: int) -> float:
    batch = case.make_batch(steps, torch.device("cpu"))
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=case.batch_size,
            learning_rate=_RATE,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=case.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        callbacks = [SlimTrainerCallback(case.settings(**_RUN, slim_live=True))] if slim else []
        trainer = Trainer(case.build(), training, train_dataset=rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        return time_call(trainer.train, case.device)


def _ideal_run(case: Case) -> float:
    """The operations of a dense run over those of a live one, which at each step are in proportion to its sparsity."""
    steps, flops = case.arguments.run_steps, case.count_flops()
    saved = flops - case.count_flops(slim=True)
    settings = SlimConfig(**_RUN)
    schedule = Schedule(place_steps(settings, steps), 1.0, settings.slim_schedule)
    return flops * steps / sum(flops - saved * schedule.sparsity_at(step) for step in range(steps))
