"""The state of one training: what it has dropped so far, and the scores it goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..arguments import CriterionName
from ..compaction import find_zero_units, has_state
from ..parallel import find_shards, whole_shapes
from ..structures import Structure
from .attached_optimizer import find_attached
from .budget_target import BudgetTarget
from .captured_batch import Call, Capture
from .dropped_units import DroppedUnits, Step
from .importance import score_structures
from .loop_door import LoopDoor
from .model_shape import ModelShape, find_shape
from .plan import Settings, Target, find_live_choice, make_plan, require_gradients
from .removed_units import RemovedUnits
from .saved_state import check_fit, read_masks, refuse_other_settings
from .smoothed_scores import Scores, agree_on, refuse_nonfinite
from .undecided_units import choose_units

logger = logging.get_logger(__name__)

_COME_BACK = (
    "Dropped units of {} have come back, and are written with zeros again: something besides the steps of training "
    "writes weights (an optimizer with slow weights or noise, averages, a callback that loads weights)."
)


class Slimmer(LoopDoor):
    """The masks of a training, the scores behind them, and how far the schedule has come.

    In a loop of your own, `attach` it to the optimizer; `SlimTrainerCallback` does the same for the Trainer. The other
    arguments are for the Trainer.

    Args:
        model: The model to be trained, as it is called. Units that are zero already count as dropped.
        settings: A `SlimConfig`, or the list that `parse_auto_slim_config` returned.
        max_steps: Optimizer steps of the whole training.
        begin: Optimizer steps done before slimming begins; fractions in the settings are of those that remain.
        saved: What `to_state` gave when a checkpoint was written, to go on from there.
        optimizer: What the Trainer hands to callbacks.
        obstacle: Why shapes cannot change in this training, if they cannot.
        find_others: Gives the other callbacks of the Trainer, which may keep copies of weights.

    Attributes:
        plan: What is removed, and when.
        shape: Which units the model has.
        scores: The importance scores.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; the units are those that the
            model had before anything was dropped.
        step: Optimizer steps done, where it is attached to the optimizer.

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
        obstacle: str | None = None,
        find_others: Callable[[], Iterable[Any]] = list,
    ) -> None:
        """See the class."""
        super().__init__(model, settings, max_steps)
        self._find_others = find_others
        self.begin(self._find_models()[1], begin, saved, optimizer, obstacle)

    def begin(
        self, model: nn.Module, begin: int, saved: Mapping[str, Any] | None, optimizer: Any, obstacle: str | None
    ) -> None:
        """Begin, or go on from what was saved; the arguments are those of the class."""
        self._shards = find_shards(model, optimizer)
        settings, steps = self._settings, None
        if saved is not None:
            refuse_other_settings(saved, settings)
            steps = saved["steps"]
        was_masked = saved is not None and not saved["live"] and any(saved["events"])
        begins_anew = was_masked or find_live_choice(settings) is False or (obstacle is not None and saved is None)
        shape = None if begins_anew else find_shape(model)
        with whole_shapes(model):
            self.shape = shape or ModelShape(model)
            self.shape.is_recorded = False
            found = self.shape.found
            sizes = self.shape.sizes_before(model)
            self.plan = make_plan(model, settings, self.max_steps, found=found, begin=begin, steps=steps, sizes=sizes)
            require_gradients(model, self.plan)
        keeps_zeros = was_masked or (saved is not None and bool(saved.get("zeros")))
        self._units: DroppedUnits = choose_units(
            self.plan, self.shape, self._shards, model, optimizer, obstacle=obstacle, keeps_zeros=keeps_zeros
        )
        used = self.shape.masks  # weights are loaded before or after the state of a loop
        if saved is None or "step" not in saved:
            found_used = find_zero_units(model, self._current(self.plan.structures), self._shards, whole=True)
            used = {name: self.shape.expand(name, mask) for name, mask in found_used.items()}
        self.masks = {s.name: used[s.name].clone() for s in self.plan.structures}
        self.scores = Scores(self._shards)
        self._capture = Capture()
        self._warned: set[str] = set()
        self._events = [0] * len(self.plan.targets)
        if saved is not None:
            self._take_up(saved)
        self._units.apply(model, self.masks, optimizer, Step())
        self._undo = self._shards.call_before_step(lambda: self._score(model))

    def settle(self, model: nn.Module, optimizer: Any, obstacle: str | None) -> None:
        """Take note of the optimizer in a loop, and of shapes that cannot change after all; see `choose_units`."""
        if obstacle is not None and self._units.removes:
            self._units = choose_units(
                self.plan, self.shape, self._shards, model, optimizer, obstacle=obstacle, keeps_zeros=False
            )
        used = find_zero_units(model, self._current(self.plan.structures), self._shards, whole=True)
        lost = [name for name, mask in self.masks_left.items() if (mask & ~used[name]).any()]
        if lost:
            raise RuntimeError(
                f"Units of {', '.join(lost)} are zero that were not when Slimmer was made, or that its state keeps: "
                "load weights before Slimmer is made; those of a checkpoint with the state of the same step."
            )
        self._units = self._units.apply(model, self.masks, optimizer, Step())

    def close(self) -> None:
        """Leave the optimizer and the model's hooks as they were."""
        self._undo()
        self._capture.end()

    @property
    def is_live(self) -> bool:
        """Whether dropped units have left the model, or will."""
        return isinstance(self._units, RemovedUnits) or self.shape.has_removed

    @property
    def may_remove(self) -> bool:
        """Whether units leave the model in this training, as far as is known, or have left it."""
        return self._units.removes or self.is_live

    @property
    def unproven(self) -> set[str]:
        """The names of the structures that have lost units, but never in a step in which a batch proved it."""
        return self.shape.unproven

    @property
    def has_reached_target(self) -> bool:
        """Whether the last pruning step of every target is done."""
        targets = zip(self.plan.targets, self._events, strict=True)
        return all(events == len(target.schedule.steps) for target, events in targets)

    def score(self, model: nn.Module, step: int, *, may_be_skipped: bool, scale: torch.Tensor | None = None) -> None:
        """Score the units from the gradients of a step that is about to be taken.

        Scores that are not finite are refused at once on the CPU. Elsewhere that would make the device wait at every
        step, so they are refused at the next pruning step or checkpoint.

        Args:
            model: The model, with gradients.
            step: The optimizer step, counted from 1.
            may_be_skipped: Whether the optimizer may skip the step, so that infinite gradients are no error yet.
            scale: The loss scale, if it is still in the gradients.

        Raises:
            RuntimeError: If no gradient is there, or one is NaN or infinite.
        """
        if self._shards.scores_before_step:
            return  # the step has been taken already, and the units scored right before it
        self._score(model, step)
        if scale is not None:
            self.scores.unscale(scale)
        if not may_be_skipped:
            self.scores.check(step)

    def watch(self, model: nn.Module, step: int, called: nn.Module | None = None) -> None:
        """Keep the batch of a step, if it ends with units leaving the model; called before its forward pass.

        Args:
            model: The model.
            step: The optimizer step, counted from 1.
            called: What stands for the model where it is called: the model as torch.compile has wrapped it.
        """
        is_waiting = not self._units.is_settled and self.shape.find_shrinking(self.masks)
        if self._units.removes and (is_waiting or any(self._due(step))):
            self._capture.begin(model, called)

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
            VerificationError: If slim_live=True and the model is another one without the units; none is dropped then.
        """
        calls = self._capture.end()
        self.scores.count(step, skipped)
        units = self._units
        if not units.is_settled and has_state(optimizer):
            self._units = units.settle(model, optimizer, self.plan.structures)
        before = dict(self.masks), list(self._events)
        due = self._due(step)
        if any(due):
            self.restore_zeros(model, optimizer)
        changed = self._units is not units
        for number, target in enumerate(self.plan.targets):
            if due[number] and self._select(model, target, step):
                self._events[number] = target.schedule.events_until(step)
                changed = True
        if not changed:
            self._units.hold(model, optimizer)
            return
        try:
            self._apply(model, optimizer, calls)
        except BaseException:
            self.masks, self._events = before
            raise
        self._forget_scores()

    def restore_zeros(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Look at the dropped units that are in the model as zeros, and write zeros again where something is not.

        What has come back is written after every step from then on, and named once in a warning.

        Args:
            model: The model, or a copy of it.
            optimizer: The optimizer, if there still is one, for the zeros in its state.

        Returns:
            The names of the structures of which units had come back.
        """
        if self.shape.is_unnamed or not self.shape.fits(model):
            return []  # it has been made smaller since, or changed otherwise
        if names := self._units.restore(model, optimizer):
            self._warn_once("back", _COME_BACK.format(", ".join(names)))
        return names

    def sparsities(self) -> dict[str, float]:
        """The sparsity in force.

        Returns:
            `ffn2_sparsity` and `mha_sparsity`: the fractions of the units of the structures in the plan that are
            dropped; 0 where none are planned.
        """
        return self.plan.find_sparsities(self.masks)

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, as plain JSON data."""
        self.scores.refuse_bad_step()
        masks = self.shape.masks if self.is_live else self.masks
        zeros = {name: masks[name] & ~mask for name, mask in self.masks.items()}
        return {
            "settings": self.plan.settings,
            "steps": [list(target.schedule.steps) for target in self.plan.targets],
            "events": list(self._events),
            "live": self.is_live,
            "dropped": {name: (~mask).nonzero().flatten().tolist() for name, mask in masks.items()},
            "zeros": {name: units.nonzero().flatten().tolist() for name, units in zeros.items() if units.any()},
            "unproven": sorted(self.unproven),
            "scores": {n: self.shape.expand(n, scores).tolist() for n, scores in self.scores.smoothed.items()},
        }

    def _current(self, structures: Iterable[Structure]) -> list[Structure]:
        """Structures as they are in the model now."""
        return [self.shape.find_current(structure.name) for structure in structures]

    def _score(self, model: nn.Module, step: int = 0) -> None:
        scored: dict[CriterionName, list[Structure]] = {}
        for target, events in zip(self.plan.targets, self._events, strict=True):
            if target.criterion != "magnitude" and events < len(target.schedule.steps):
                scored.setdefault(target.criterion, []).extend(self._current(target.structures))
        self.scores.take(model, scored, step)

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        check_fit(saved, self.plan)
        for dropped in ({name: saved["dropped"][name] for name in self.masks}, saved.get("zeros", {})):
            for name, mask in read_masks(dropped, self.masks).items():
                self.masks[name] &= mask
        self.shape.prove_all_but(saved.get("unproven", []))
        scores = {name: torch.tensor(scores) for name, scores in saved["scores"].items()}
        self.scores.take_up({name: self.shape.narrow(name, values) for name, values in scores.items()})
        self._events = list(saved["events"])

    def _due(self, step: int) -> list[bool]:
        """Which targets have a pruning step at a step, or one from before that is not done."""
        targets = zip(self.plan.targets, self._events, strict=True)
        return [target.schedule.events_until(step) > done for target, done in targets]

    def _select(self, model: nn.Module, target: Target | BudgetTarget, step: int) -> bool:
        """Drop units as the schedule says; not yet if no optimizer step has been taken so far (fp16)."""
        scores = self.scores.smoothed
        if target.criterion == "magnitude":
            scores = score_structures(model, self._current(target.structures), target.criterion, self._shards)
            refuse_nonfinite(scores, step)
        elif not self.scores.can_select():
            return False
        self.scores.refuse_bad_step()
        agreed = agree_on({s.name: scores[s.name] for s in target.structures})
        whole = {name: self.shape.expand(name, values) for name, values in agreed.items()}
        self.masks.update(target.select(whole, self.masks, step))
        return True

    def _apply(self, model: nn.Module, optimizer: Any, calls: Sequence[Call]) -> None:
        """Apply the masks, and keep the scores of what is left."""
        step = Step(calls, self.has_reached_target, self._find_others())
        whole = {name: self.shape.expand(name, scores) for name, scores in self.scores.smoothed.items()}
        units = self._units.settle(model, optimizer, self.plan.structures)
        self._units = units.apply(model, self.masks, optimizer, step)
        self.scores.smoothed = {name: self.shape.narrow(name, scores) for name, scores in whole.items()}
        if self.shape.has_removed and step.is_last and self.unproven:
            self._warn_once("end", f"The removal of units is not proven for {', '.join(sorted(self.unproven))}.")

    def _forget_scores(self) -> None:
        """Let go of the scores of what has reached its target."""
        for target, events in zip(self.plan.targets, self._events, strict=True):
            for structure in target.structures if events == len(target.schedule.steps) else ():
                self.scores.smoothed.pop(structure.name, None)

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)


def find_slimmer(model: nn.Module) -> Slimmer | None:
    """Find the slimmer that is or was attached to the optimizer of a model.

    Args:
        model: Any model; a copy of one that was trained has none.

    Returns:
        The last one, None if there was none.
    """
    found = find_attached(model)
    return found if isinstance(found, Slimmer) else None
