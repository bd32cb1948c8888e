"""SlimTrainerCallback: scores, selects and zeroes units while a Trainer trains."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from .arguments import SlimConfig
from .importance import score_units, smooth_scores
from .masking import Zeros, find_zero_units, find_zeros, write_zeros
from .plan import Plan, from_state, make_plans, to_state
from .selection import select_units
from .structures import total_units

logger = logging.get_logger(__name__)


class SlimTrainerCallback(TrainerCallback, ExportableState):
    """Raises the sparsity of FFN2 columns and attention heads on a schedule during `Trainer.train`.

    Args:
        config: Nothing, to read the fields of the `SlimTrainingArguments`; a `SlimConfig`, beside any other arguments;
            or the list that `parse_auto_slim_config` returns.

    Attributes:
        masks: After training has begun, for each structure's name a boolean tensor of shape `[units]`, True = keep.
    """

    def __init__(self, config: SlimConfig | Sequence[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """See the class."""
        self.config = from_state(config)
        self.saved: dict[str, Any] | None = None  # set by the Trainer when it restores callbacks; read by nobody
        self._clear()

    def _clear(self) -> None:
        self.plans: list[Plan] = []
        self.masks: dict[str, torch.Tensor] = {}
        self._scores: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._zeros: Zeros = []
        self._events: list[int] = []
        self._step = 0
        self._settings: SlimConfig | list[dict[str, Any]] | None = None

    @property
    def settings(self) -> SlimConfig | list[dict[str, Any]] | None:
        """The settings of the training in progress: those given, or those of the training arguments."""
        return self._settings

    def state(self) -> dict[str, Any]:
        """What the Trainer saves in `trainer_state.json`: settings, dropped units and smoothed scores."""
        return {"args": {"config": to_state(self.config)}, "attributes": {"saved": self._to_saved()}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a second one on the same trainer."""
        self._refuse_second(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check the settings against the model and the run; start, or take up what the checkpoint holds."""
        self._clear()
        self._refuse_second(state)
        self._settings = SlimConfig.from_arguments(args) if self.config is None else self.config
        self.plans = make_plans(model, self._settings, state.max_steps)
        if not self.plans:
            warnings.warn(
                "SlimTrainerCallback has nothing to do: ffn2_sparsity and mha_sparsity are both 0.", stacklevel=2
            )
        self._events = [0] * len(self.plans)
        for plan in self.plans:
            self.masks.update(find_zero_units(model, plan.structures, whole=True))
        if state.global_step > 0:
            self._resume(state)
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._plan_zeros(model)
        write_zeros(model, self._zeros)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Score the units from the gradients of this step."""
        self._pending = {}
        for plan, events in zip(self.plans, self._events, strict=True):
            if plan.criterion != "magnitude" and events < len(plan.schedule.steps):
                for structure in plan.structures:
                    self._pending[structure.name] = score_units(model, structure, plan.criterion)
        if getattr(optimizer, "scaler", None) is None:
            self._refuse_nonfinite(self._pending, state.global_step + 1)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Drop units if it is time, and write the zeros again that the optimizer may have moved."""
        self._step = state.global_step + 1
        if not getattr(optimizer, "step_was_skipped", False):
            self._refuse_nonfinite(self._pending, self._step)
            for name, scores in self._pending.items():
                self._scores[name] = smooth_scores(self._scores.get(name), scores)
        self._pending = {}
        reached = self._has_reached_target()
        due = [plan.schedule.events_until(self._step) for plan in self.plans]
        if due != self._events:
            for number, plan in enumerate(self.plans):
                if due[number] > self._events[number] and self._select(model, plan):
                    self._events[number] = due[number]
            self._plan_zeros(model)
        write_zeros(model, self._zeros)
        if args.load_best_model_at_end and not reached and self._has_reached_target():
            logger.info(f"The target sparsity is reached at step {self._step}; the best model is sought from here on.")
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if training ended before the schedule did."""
        if not self._has_reached_target():
            steps = max(plan.schedule.steps[-1] for plan in self.plans)
            logger.warning(
                f"Training ended at step {state.global_step}, before the last pruning step, {steps}: the sparsities "
                f"reached are {self.sparsities()}."
            )

    def sparsities(self) -> dict[str, float]:
        """The sparsity in force.

        Returns:
            `ffn2_sparsity` and `mha_sparsity`: the fractions of the units of the structures in the schedule that are
            dropped; 0 where none are scheduled.
        """
        logs = {}
        for kind, name in (("ffn", "ffn2_sparsity"), ("mha", "mha_sparsity")):
            structures = [s for plan in self.plans if plan.kind == kind for s in plan.structures]
            dropped = sum(int((~self.masks[s.name]).sum()) for s in structures)
            logs[name] = dropped / total_units(structures) if structures else 0.0
        return logs

    def _select(self, model: nn.Module, plan: Plan) -> bool:
        """Drop units as the plan's schedule says; not yet if no optimizer step has been taken so far (fp16)."""
        scores = self._scores
        if plan.criterion == "magnitude":
            scores = {s.name: score_units(model, s, plan.criterion) for s in plan.structures}
            self._refuse_nonfinite(scores, self._step)
        if any(s.name not in scores for s in plan.structures):
            return False
        self.masks.update(
            select_units(
                plan.structures,
                scores,
                self.masks,
                plan.schedule.sparsity_at(self._step),
                scope=plan.scope,
                round_to=plan.round_to,
                min_heads=plan.min_heads,
            )
        )
        return True

    def _refuse_second(self, state: TrainerState) -> None:
        """The Trainer keeps a list of states where several callbacks of a class have one."""
        if isinstance((state.stateful_callbacks or {}).get(type(self).__name__), list):
            raise ValueError(
                "The trainer has more than one SlimTrainerCallback, and each would drop units of the same model: keep "
                "one, and give it all settings."
            )

    def _has_reached_target(self) -> bool:
        return all(events == len(plan.schedule.steps) for plan, events in zip(self.plans, self._events, strict=True))

    def _plan_zeros(self, model: nn.Module) -> None:
        self._zeros = find_zeros(model, [s for plan in self.plans for s in plan.structures], self.masks)

    def _refuse_nonfinite(self, scores: Mapping[str, torch.Tensor], step: int) -> None:
        if not scores or torch.isfinite(torch.cat(list(scores.values()))).all():
            return
        bad = [name for name, values in scores.items() if not torch.isfinite(values).all()]
        where = ", ".join(bad)
        if len(bad) == len(scores):
            where = f"all {len(bad)} structures (the Trainer's clipping spreads NaN from one gradient to every other)"
        raise RuntimeError(
            f"The importance scores are not finite at step {step}, in {where}: weights or gradients hold NaN or "
            "infinity. Lower the learning rate, or look at the loss and the batch of this step."
        )

    def _to_saved(self) -> dict[str, Any]:
        return {
            "settings": to_state(self._settings),
            "events": self._events,
            "dropped": {name: (~mask).nonzero().flatten().tolist() for name, mask in self.masks.items()},
            "scores": {name: scores.tolist() for name, scores in self._scores.items()},
        }

    def _resume(self, state: TrainerState) -> None:
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        saved = stored and stored["attributes"]["saved"]
        if not saved or saved["settings"] is None:
            logger.warning(
                f"The checkpoint of step {state.global_step} holds no slimming state; the schedule goes on from there "
                "with nothing dropped so far."
            )
            return
        settings = to_state(self._settings)
        if saved["settings"] != settings:
            raise ValueError(
                f"The checkpoint was made with other slim settings: {_difference(saved['settings'], settings)}. "
                "Resume with the settings of the checkpoint, or start anew."
            )
        self._events = list(saved["events"])
        for name, dropped in saved["dropped"].items():
            self.masks[name][dropped] = False
        self._scores = {name: torch.tensor(scores) for name, scores in saved["scores"].items()}


def install_log_hook() -> None:
    """Add the sparsities to what a Trainer logs, before any of its callbacks sees it; once, however often called.

    A callback cannot do this by itself: reporters such as TensorBoard come before it in the Trainer's list.
    """
    original = CallbackHandler.on_log
    if getattr(original, "adds_sparsities", False):
        return

    @functools.wraps(original)
    def on_log(
        self: CallbackHandler,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
    ) -> TrainerControl:
        for callback in self.callbacks:
            if isinstance(callback, SlimTrainerCallback) and callback.plans and "loss" in logs:
                logs.update(callback.sparsities())
                state.log_history[-1].update(callback.sparsities())
        return original(self, args, state, control, logs)

    on_log.adds_sparsities = True  # type: ignore[attr-defined]
    CallbackHandler.on_log = on_log


def _difference(stored: Any, given: Any) -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        return ", ".join(
            f"{name}={stored.get(name)!r} there, {given.get(name)!r} here"
            for name in sorted({*stored, *given})
            if stored.get(name) != given.get(name)
        )
    return f"{stored!r} there, {given!r} here"
