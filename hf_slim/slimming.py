"""What one training run has dropped so far, and the scores it goes by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn

from .arguments import SlimConfig
from .importance import score_structures, smooth_scores
from .masking import Zeros, find_zero_units, find_zeros, write_zeros
from .plan import Plan, make_plans, to_state
from .selection import select_units
from .structures import Structure, get_tensor, total_units
from .zero import call_before_step, clip_factor, find_zero_optimizer, whole_shapes

Settings = SlimConfig | Sequence[dict[str, Any]]

_MOST = torch.finfo(torch.float32).max
"""The largest finite score; no comparison with NaN holds."""


class Slimming:
    """The masks of a training run, the scores behind them, and how far the schedule has come.

    Args:
        model: The model to be trained. Units that are zero already count as dropped.
        settings: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the whole training.
        begin: Optimizer steps done before slimming begins; fractions in the settings are of those that remain.
        saved: What `to_state` gave when a checkpoint was written, to go on from there.
        optimizer: What the Trainer hands to callbacks.

    Attributes:
        plans: What is removed, and when.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

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
    ) -> None:
        """See the class."""
        self.settings = settings
        self._zero = find_zero_optimizer(optimizer)
        steps = None
        if saved is not None:
            _refuse_other_settings(saved, settings)
            steps = [list(plan_steps) for plan_steps in saved["steps"]]
        with whole_shapes(model):
            self.plans = make_plans(model, settings, max_steps, begin=begin, steps=steps)
        self.masks = find_zero_units(model, self.structures, whole=True, zero=self._zero)
        self._scores: dict[str, torch.Tensor] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._is_checked = False
        self._events = [0] * len(self.plans)
        if saved is not None:
            self._take_up(saved)
        self._zeros: Zeros = find_zeros(model, self.structures, self.masks, self._zero)
        write_zeros(model, self._zeros, zero=self._zero)
        self._undo: Callable[[], None] = lambda: None
        if self._zero is not None:
            self._undo = call_before_step(self._zero, lambda scale: self._score_scaled(model, scale))

    def close(self) -> None:
        """Leave the optimizer as it was."""
        self._undo()

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
        if not may_be_skipped:
            _refuse_nonfinite(self._pending, step)
            self._is_checked = True

    def advance(self, model: nn.Module, optimizer: Any, step: int, *, skipped: bool) -> None:
        """Take a step's scores into account, drop units if it is time, and write the zeros again.

        Args:
            model: The model, after the optimizer has changed it.
            optimizer: The optimizer, in whose state there may be weights as well.
            step: The optimizer step, counted from 1.
            skipped: Whether the optimizer skipped the step, so that its scores do not count.

        Raises:
            RuntimeError: If scores are NaN or infinite.
        """
        if not skipped and self._pending:
            if not self._is_checked:
                _refuse_nonfinite(self._pending, step)
            if self._zero is not None:
                factor = clip_factor(self._zero)
                self._pending = {name: scores * factor for name, scores in self._pending.items()}
            for name, scores in self._pending.items():
                self._scores[name] = smooth_scores(self._scores.get(name), scores)
        self._pending = {}
        changed = False
        for number, plan in enumerate(self.plans):
            due = plan.schedule.events_until(step)
            if due > self._events[number] and self._select(model, plan, step):
                self._events[number] = due
                changed = True
                if due == len(plan.schedule.steps):
                    for structure in plan.structures:
                        self._scores.pop(structure.name, None)
        if changed:
            self._zeros = find_zeros(model, self.structures, self.masks, self._zero)
        write_zeros(model, self._zeros, optimizer, self._zero)

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
        return {
            "settings": to_state(self.settings),
            "steps": [list(plan.schedule.steps) for plan in self.plans],
            "events": list(self._events),
            "dropped": {name: (~mask).nonzero().flatten().tolist() for name, mask in self.masks.items()},
            "scores": {name: scores.tolist() for name, scores in self._scores.items()},
        }

    def _score(self, model: nn.Module, step: int = 0) -> None:
        self._pending, self._is_checked = {}, False
        scored: dict[Any, list[Structure]] = {}
        for plan, events in zip(self.plans, self._events, strict=True):
            if plan.criterion != "magnitude" and events < len(plan.schedule.steps):
                scored.setdefault(plan.criterion, []).extend(plan.structures)
        for criterion, structures in scored.items():
            if self._zero is None:
                _require_gradients(model, structures, step)
            self._pending.update(score_structures(model, structures, criterion, self._zero))

    def _score_scaled(self, model: nn.Module, scale: float) -> None:
        """Score right before DeepSpeed's step, from gradients that are still multiplied by the loss scale."""
        self._score(model)
        self._pending = {name: scores / scale for name, scores in self._pending.items()}

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        units = {s.name: s.units for s in self.structures}
        if set(saved["dropped"]) != set(units):
            odd = sorted(set(saved["dropped"]) ^ set(units))
            raise damaged(f"{odd[0]!r} is in only one of the state and the model")
        for name, dropped in saved["dropped"].items():
            if not all(type(unit) is int and 0 <= unit < units[name] for unit in dropped):
                raise damaged(f"the dropped units of {name} are not among its {units[name]} units")
            self.masks[name][dropped] = False
        for name, scores in saved["scores"].items():
            if len(scores) != units.get(name) or not all(abs(score) <= _MOST for score in scores):
                raise damaged(f"the scores of {name} are not {units.get(name)} finite numbers")
            self._scores[name] = torch.tensor(scores)
        self._events = list(saved["events"])
        if len(self._events) != len(self.plans) or any(
            not 0 <= done <= len(plan.schedule.steps) for done, plan in zip(self._events, self.plans, strict=False)
        ):
            raise damaged(f"{self._events} pruning steps of {len(self.plans)} schedules are said to be done")

    def _select(self, model: nn.Module, plan: Plan, step: int) -> bool:
        """Drop units as the plan's schedule says; not yet if no optimizer step has been taken so far (fp16)."""
        scores = self._scores
        if plan.criterion == "magnitude":
            scores = score_structures(model, plan.structures, plan.criterion, self._zero)
            _refuse_nonfinite(scores, step)
        if any(s.name not in scores for s in plan.structures):
            return False
        self.masks.update(
            select_units(
                plan.structures,
                _agree({s.name: scores[s.name] for s in plan.structures}),
                self.masks,
                plan.schedule.sparsity_at(step),
                scope=plan.scope,
                round_to=plan.round_to,
                min_heads=plan.min_heads,
            )
        )
        return True


def check_saved(saved: Any) -> None:
    """Refuse what cannot have come from `Slimming.to_state`.

    Args:
        saved: What a checkpoint holds.

    Raises:
        ValueError: If parts are missing or of other types.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "settings": (dict, list),
        "steps": (list,),
        "events": (list,),
        "dropped": (dict,),
        "scores": (dict,),
    }
    for name, kind in kinds.items():
        if not isinstance(saved, dict) or not isinstance(saved.get(name), kind):
            raise damaged(f"it has no {name}")
    if any(not isinstance(plan, list) or not plan or any(type(s) is not int for s in plan) for plan in saved["steps"]):
        raise damaged("its steps are not lists of numbers")
    if any(type(events) is not int for events in saved["events"]):
        raise damaged("its events are not numbers")
    if not all(isinstance(values, list) for name in ("dropped", "scores") for values in saved[name].values()):
        raise damaged("its dropped units or scores are not lists")
    if any(type(score) not in (int, float) for scores in saved["scores"].values() for score in scores):
        raise damaged("its scores are not numbers")


def damaged(what: str) -> ValueError:
    """The error for a state that is not as it was written."""
    return ValueError(
        f"The slimming state in the checkpoint's trainer_state.json does not fit or is damaged: {what}. Resume from "
        "another checkpoint, with the model of the run."
    )


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


def _refuse_other_settings(saved: Mapping[str, Any], settings: Settings) -> None:
    given = json.loads(json.dumps(to_state(settings)))
    if saved["settings"] != given:
        raise ValueError(
            f"The checkpoint was made with other slim settings: {_difference(saved['settings'], given)}. "
            "Resume with the settings of the checkpoint, or start anew."
        )


def _difference(stored: Any, given: Any) -> str:
    if isinstance(stored, list) and isinstance(given, list):
        if len(stored) != len(given):
            return f"{len(stored)} entries there, {len(given)} here"
        entries = enumerate(zip(stored, given, strict=True))
        return "; ".join(f"entry {number}: {_difference(*pair)}" for number, pair in entries if pair[0] != pair[1])
    if isinstance(stored, dict) and isinstance(given, dict):
        return ", ".join(
            f"{name}={stored.get(name)!r} there, {given.get(name)!r} here"
            for name in sorted({*stored, *given})
            if stored.get(name) != given.get(name)
        )
    return f"{stored!r} there, {given!r} here"
