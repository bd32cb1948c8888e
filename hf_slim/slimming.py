"""What one training run has dropped so far, and the scores it goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers.utils import logging

from .arguments import SlimConfig
from .discovery import find_structures
from .importance import score_structures, smooth_scores
from .live import LiveUnits, find_live_obstacle, find_state_obstacle
from .masking import MaskedUnits, find_zero_units
from .optimizer_state import has_state
from .plan import Plan, make_plans, to_state
from .saved_state import Settings, check_fit, read_masks, refuse_other_settings
from .selection import select_units
from .structures import Structure, get_tensor, total_units
from .zero import call_before_step, clip_factor, find_zero_optimizer, whole_shapes

logger = logging.get_logger(__name__)


class Slimming:
    """The masks of a training run, the scores behind them, and how far the schedule has come.

    Args:
        model: The model to be trained. Units that are zero already count as dropped.
        settings: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the whole training.
        begin: Optimizer steps done before slimming begins; fractions in the settings are of those that remain.
        saved: What `to_state` gave when a checkpoint was written, to go on from there.
        optimizer: What the Trainer hands to callbacks.
        live: The units of this model, if it has been made smaller by an earlier training or for a checkpoint.
        obstacle: Why shapes cannot change in this training, if they cannot.

    Attributes:
        plans: What is removed, and when.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; the units are those that the
            model had before anything was dropped.

    Raises:
        ValueError: If the settings cannot be carried out on this model in this run, differ from those of the
            checkpoint, or the saved state does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        max_steps: int,
        *,
        begin: int = 0,
        saved: Mapping[str, Any] | None = None,
        optimizer: Any = None,
        live: LiveUnits | None = None,
        obstacle: str | None = None,
    ) -> None:
        """See the class."""
        self.settings = settings
        self._zero = find_zero_optimizer(optimizer)
        steps = None
        if saved is not None:
            refuse_other_settings(saved, settings)
            steps = [list(plan_steps) for plan_steps in saved["steps"]]
        wanted = settings.slim_live if isinstance(settings, SlimConfig) else False
        was_masked = saved is not None and not saved["live"] and any(saved["events"])
        if wanted is False or was_masked or (obstacle is not None and saved is None):
            live = None
        with whole_shapes(model):
            found = find_structures(model) if live is None else live.found
            self.plans = make_plans(model, settings, max_steps, begin=begin, steps=steps, found=found)
        obstacle = obstacle or find_live_obstacle(self.structures)
        if obstacle is None and live is not None:
            obstacle = find_state_obstacle(optimizer, model, [live.current(s) for s in self.structures])
        if obstacle is not None and self.plans and (wanted is True or live is not None):
            asked = "slim_live=True" if wanted is True else "Live compaction, as before in this training,"
            raise ValueError(
                f"{asked} cannot be used here: {obstacle}. Build the model anew and start or resume with that; where "
                "shapes cannot change, train with slim_live=False."
            )
        self._units: MaskedUnits | LiveUnits = live or MaskedUnits(self.structures, self._zero)
        self._live: LiveUnits | None = None  # taken when the optimizer's state is known, at the first step
        if self.plans and live is None and wanted is not False and obstacle is None and not was_masked:
            self._live = LiveUnits(found)
        self.masks = (
            {s.name: live.masks[s.name].clone() for s in self.structures}
            if live is not None
            else find_zero_units(model, self.structures, whole=True, zero=self._zero)
        )
        self._scores: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._is_checked = False  # whether the pending scores are known to be finite
        self._taken: int | torch.Tensor = 0  # above 0 from the first step whose scores count
        self._bad_step: torch.Tensor | None = None  # the first step with a score that is not finite, 0 for none
        self._events = [0] * len(self.plans)
        if saved is not None:
            self._take_up(saved)
        self._units.apply(model, self.masks, optimizer)
        self._undo: Callable[[], None] = lambda: None
        if self._zero is not None:
            self._undo = call_before_step(self._zero, lambda scale: self._score_scaled(model, scale))

    def close(self) -> None:
        """Leave the optimizer as it was."""
        self._undo()

    @property
    def is_live(self) -> bool:
        """Whether dropped units have left the model."""
        return self.live is not None

    @property
    def live(self) -> LiveUnits | None:
        """The units of the model, if dropped ones have left it."""
        return self._units if isinstance(self._units, LiveUnits) else None

    @property
    def structures(self) -> list[Structure]:
        """All structures in the plans."""
        return [s for plan in self.plans for s in plan.structures]

    @property
    def has_reached_target(self) -> bool:
        """Whether the last pruning step of every plan is done."""
        return all(events == len(plan.schedule.steps) for plan, events in zip(self.plans, self._events, strict=True))

    @property
    def last_step(self) -> int:
        """The optimizer step at which the target sparsity is reached; 0 if there is nothing to do."""
        return max((plan.schedule.steps[-1] for plan in self.plans), default=0)

    def score(self, model: nn.Module, step: int, *, may_be_skipped: bool) -> None:
        """Score the units from the gradients of a step that is about to be taken.

        Scores that are not finite are refused at once on the CPU. Elsewhere that would make the device wait at every
        step, so they are refused at the next pruning step or checkpoint.

        Args:
            model: The model, with gradients.
            step: The optimizer step, counted from 1.
            may_be_skipped: Whether the optimizer may skip the step, so that infinite gradients are no error yet.

        Raises:
            RuntimeError: If no gradient is there, or one is NaN or infinite.
        """
        if self._zero is not None:
            return  # the step has been taken already, and the units scored right before it
        self._score(model, step)
        if not may_be_skipped and all(scores.device.type == "cpu" for scores in self._pending.values()):
            _refuse_nonfinite(self._pending, step)
            self._is_checked = True

    def advance(self, model: nn.Module, optimizer: Any, step: int, *, skipped: bool | torch.Tensor) -> None:
        """Take a step's scores into account, and drop units if it is time; keep dropped ones out.

        Args:
            model: The model, after the optimizer has changed it.
            optimizer: The optimizer, in whose state there may be weights as well.
            step: The optimizer step, counted from 1.
            skipped: Whether the optimizer skipped the step, so that its scores do not count; where only the device
                knows, a boolean tensor there.

        Raises:
            RuntimeError: If scores are NaN or infinite, or slim_live=True and the optimizer's state cannot be sliced.
        """
        if skipped is not True and self._pending:
            self._smooth(step, skipped)
        self._pending = {}
        changed = self._live is not None and has_state(optimizer) and self._choose(model, optimizer)
        for number, plan in enumerate(self.plans):
            due = plan.schedule.events_until(step)
            if due > self._events[number] and self._select(model, plan, step):
                self._events[number] = due
                changed = True
                if due == len(plan.schedule.steps):
                    for structure in plan.structures:
                        self._scores.pop(structure.name, None)
        if changed:
            self._apply(model, optimizer)
        else:
            self._units.hold(model, optimizer)

    def sparsities(self) -> dict[str, float]:
        """The sparsity in force.

        Returns:
            `ffn2_sparsity` and `mha_sparsity`: the fractions of the units of the structures in the plans that are
            dropped; 0 where none are planned.
        """
        found = {}
        for kind, name in (("ffn", "ffn2_sparsity"), ("mha", "mha_sparsity")):
            structures = [s for s in self.structures if s.kind == kind]
            dropped = sum(int((~self.masks[s.name]).sum()) for s in structures)
            found[name] = dropped / total_units(structures) if structures else 0.0
        return found

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, as plain JSON data."""
        self._refuse_bad_step()
        masks = self.masks if self.live is None else {**self.live.masks, **self.masks}
        return {
            "settings": to_state(self.settings),
            "steps": [list(plan.schedule.steps) for plan in self.plans],
            "events": list(self._events),
            "live": self.is_live,
            "dropped": {name: (~mask).nonzero().flatten().tolist() for name, mask in masks.items()},
            "scores": {name: self._units.expand(name, scores).tolist() for name, scores in self._scores.items()},
        }

    def _score(self, model: nn.Module, step: int = 0) -> None:
        self._pending, self._is_checked = {}, False
        scored: dict[Any, list[Structure]] = {}
        for plan, events in zip(self.plans, self._events, strict=True):
            if plan.criterion != "magnitude" and events < len(plan.schedule.steps):
                scored.setdefault(plan.criterion, []).extend(self._units.current(s) for s in plan.structures)
        for criterion, structures in scored.items():
            if self._zero is None:
                _require_gradients(model, structures, step)
            self._pending.update(score_structures(model, structures, criterion, self._zero))

    def _score_scaled(self, model: nn.Module, scale: float) -> None:
        """Score right before DeepSpeed's step, from gradients that are still multiplied by the loss scale."""
        self._score(model)
        self._pending = {name: scores / scale for name, scores in self._pending.items()}

    def _smooth(self, step: int, skipped: bool | torch.Tensor) -> None:
        """Smooth the scores of a step; on a device without waiting for it."""
        if self._zero is not None:
            factor = clip_factor(self._zero)
            self._pending = {name: scores * factor for name, scores in self._pending.items()}
        counted = skipped.logical_not() if isinstance(skipped, torch.Tensor) else None
        first = next(iter(self._pending.values()))
        if first.device.type == "cpu":
            if not self._is_checked:
                _refuse_nonfinite(self._pending, step)
        else:
            together = torch.cat([scores.to(first.device) for scores in self._pending.values()])
            bad = torch.isfinite(together).all().logical_not()
            bad = (bad if counted is None else bad.logical_and(counted)).mul(step)
            before = torch.zeros_like(bad) if self._bad_step is None else self._bad_step
            self._bad_step = torch.where(before.eq(0), bad, before)
        for name, scores in self._pending.items():
            smoothed = smooth_scores(self._scores.get(name), scores)
            if counted is not None:
                kept = self._scores.get(name, torch.zeros_like(scores)).to(scores.device)
                smoothed = torch.where(counted.to(scores.device), smoothed, kept)
            self._scores[name] = smoothed
        self._taken = 1 if counted is None else counted.add(self._taken)

    def _refuse_bad_step(self) -> None:
        if self._bad_step is not None and int(self._bad_step):
            _refuse_nonfinite(self._scores, int(self._bad_step))

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        check_fit(saved, self.plans)
        for name, mask in read_masks({name: saved["dropped"][name] for name in self.masks}, self.masks).items():
            self.masks[name] &= mask
        for name, scores in saved["scores"].items():
            self._scores[name] = self._units.narrow(name, torch.tensor(scores))
        self._taken = len(self._scores)
        self._events = list(saved["events"])

    def _select(self, model: nn.Module, plan: Plan, step: int) -> bool:
        """Drop units as the plan's schedule says; not yet if no optimizer step has been taken so far (fp16)."""
        scores = self._scores
        if plan.criterion == "magnitude":
            current = [self._units.current(s) for s in plan.structures]
            scores = score_structures(model, current, plan.criterion, self._zero)
            _refuse_nonfinite(scores, step)
        elif not int(self._taken):
            return False
        self._refuse_bad_step()
        agreed = _agree({s.name: scores[s.name] for s in plan.structures})
        self.masks.update(
            select_units(
                plan.structures,
                {name: self._units.expand(name, values) for name, values in agreed.items()},
                self.masks,
                plan.schedule.sparsity_at(step),
                scope=plan.scope,
                round_to=plan.round_to,
                min_heads=plan.min_heads,
            )
        )
        return True

    def _apply(self, model: nn.Module, optimizer: Any) -> None:
        """Apply the masks, and keep the scores of what is left."""
        self._choose(model, optimizer)
        scores = {name: self._units.expand(name, values) for name, values in self._scores.items()}
        self._units.apply(model, self.masks, optimizer)
        self._scores = {name: self._units.narrow(name, values) for name, values in scores.items()}

    def _choose(self, model: nn.Module, optimizer: Any) -> bool:
        """Take live compaction, before anything is dropped, if the optimizer's state can be sliced; once."""
        live, self._live = self._live, None
        if live is None:
            return False
        obstacle = find_state_obstacle(optimizer, model, self.structures)
        if obstacle is None:
            self._units = live
            return True
        if isinstance(self.settings, SlimConfig) and self.settings.slim_live is True:
            raise RuntimeError(
                f"slim_live=True cannot be used here: {obstacle}. Use another optimizer, or slim_live=False."
            )
        logger.info(f"Dropped units stay in the model as zeros until it is saved: {obstacle}.")
        return False


def _agree(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of the scores over all processes, so that every one selects the same units."""
    first = next(iter(scores.values()))
    together = reduce(torch.cat([values.to(first.device) for values in scores.values()]), "mean")
    return dict(zip(scores, together.split([len(values) for values in scores.values()]), strict=True))


def _require_gradients(model: nn.Module, structures: Sequence[Structure], step: int) -> None:
    if all(get_tensor(model, member.tensor).grad is None for s in structures for member in s.outputs):
        raise RuntimeError(
            f"At step {step} there is no gradient in any of the {len(structures)} structures that are to be scored. "
            "Optimizers that step during the backward pass (LOMO, layer-wise GaLore and Apollo) leave none: use "
            "another optimizer, or slim_criterion='magnitude'."
        )


def _refuse_nonfinite(scores: Mapping[str, torch.Tensor], step: int) -> None:
    values = list(scores.values())
    if not values or torch.isfinite(torch.cat([v.to(values[0].device) for v in values])).all():
        return
    bad = [name for name, values in scores.items() if not torch.isfinite(values).all()]
    where = ", ".join(bad)
    if len(bad) == len(scores):
        where = f"all {len(bad)} structures (the Trainer's clipping spreads NaN from one gradient to every other)"
    raise RuntimeError(
        f"The importance scores are not finite at step {step}, in {where}: weights or gradients hold NaN or "
        "infinity. Lower the learning rate, or look at the loss and the batch of this step."
    )
