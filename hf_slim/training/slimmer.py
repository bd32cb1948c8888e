"""What one training run has dropped so far, and the scores it goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..arguments import CriterionName, SlimConfig
from ..compaction import find_zero_units, has_state
from ..parallel import find_shards, whole_shapes
from ..structures import Structure, find_structures
from .captured_batch import Call, Capture
from .importance import score_structures
from .live_removal import can_slice_state, find_obstacle, remove_units
from .live_units import LiveUnits
from .masked_units import MaskedUnits
from .plan import Plan, find_sparsities, make_plans, to_state
from .saved_state import Settings, check_fit, damaged, read_masks, refuse_other_settings
from .smoothed_scores import Scores, agree_on, refuse_nonfinite
from .unit_selection import select_units

logger = logging.get_logger(__name__)

_COME_BACK = (
    "Dropped units of {} have come back, and are written with zeros again: something besides the steps of training "
    "writes weights (an optimizer with slow weights or noise, averages, a callback that loads weights)."
)


class Slimmer:
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
        find_others: Gives the other callbacks of the Trainer, which may keep copies of weights.

    Attributes:
        plans: What is removed, and when.
        scores: The importance scores.
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
        find_others: Callable[[], Iterable[Any]] = list,
    ) -> None:
        """See the class."""
        self.settings = settings
        self._find_others = find_others
        self._shards = find_shards(model, optimizer)
        steps = None
        if saved is not None:
            refuse_other_settings(saved, settings)
            steps = [list(plan_steps) for plan_steps in saved["steps"]]
        wanted = settings.slim_live if isinstance(settings, SlimConfig) else False
        self._required = required = wanted is True
        was_masked = saved is not None and not saved["live"] and any(saved["events"])
        if wanted is False or was_masked or (obstacle is not None and saved is None):
            live = None
        with whole_shapes(model):
            found = find_structures(model) if live is None else live.found
            self.plans = make_plans(model, settings, max_steps, begin=begin, steps=steps, found=found)
        obstacle = find_obstacle(live, model, optimizer, self.structures, obstacle, is_required=required)
        self._units: MaskedUnits | LiveUnits = live or MaskedUnits(self.structures, self._shards)
        self._live: LiveUnits | None = None  # taken when the optimizer's state is known, at the first step
        if self.plans and live is None and wanted is not False and obstacle is None and not was_masked:
            self._live = LiveUnits(found)
        self.masks = (
            {s.name: live.kept[s.name].clone() for s in self.structures}
            if live is not None
            else find_zero_units(model, self.structures, self._shards, whole=True)
        )
        self.scores = Scores(self._shards)
        self._capture = Capture()
        self._warned: set[str] = set()
        self._events = [0] * len(self.plans)
        self._undo: Callable[[], None] = lambda: None
        if saved is not None:
            self._take_up(saved)
        self._units.apply(model, self.masks, optimizer)
        self._undo = self._shards.call_before_step(lambda: self._score(model))

    def close(self) -> None:
        """Leave the optimizer and the model's hooks as they were."""
        self._undo()
        self._capture.end()

    @property
    def is_live(self) -> bool:
        """Whether dropped units have left the model."""
        return self.live is not None

    @property
    def unproven(self) -> set[str]:
        """The names of the structures that have lost units, but never in a step in which a batch proved it."""
        return self.live.unproven if self.live is not None else set()

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
        if self._shards.scores_before_step:
            return  # the step has been taken already, and the units scored right before it
        self._score(model, step)
        if not may_be_skipped:
            self.scores.check(step)

    def watch(self, model: nn.Module, step: int, called: nn.Module | None = None) -> None:
        """Keep the batch of a step, if it ends with units leaving the model; called before its forward pass.

        Args:
            model: The model.
            step: The optimizer step, counted from 1.
            called: What stands for the model where it is called: the model as torch.compile has wrapped it.
        """
        live = self.live or self._live
        if live is None or live.keeps_zeros:
            return
        has_zeros = self._live is not None and any(not mask.all() for mask in self.masks.values())
        if has_zeros or any(self._due(step)):
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
        changed = self._live is not None and has_state(optimizer) and self._choose(model, optimizer)
        before = dict(self.masks), list(self._events)
        due = self._due(step)
        if any(due):
            self.restore_zeros(model, optimizer)
        for number, plan in enumerate(self.plans):
            if due[number] and self._select(model, plan, step):
                self._events[number] = plan.schedule.events_until(step)
                changed = True
        if not changed:
            self._units.hold(model, optimizer)
            return
        try:
            self._apply(model, optimizer, calls)
        except RuntimeError:
            self.masks, self._events = before
            raise
        for plan, events in zip(self.plans, self._events, strict=True):
            if events == len(plan.schedule.steps):
                for structure in plan.structures:
                    self.scores.smoothed.pop(structure.name, None)

    def restore_zeros(self, model: nn.Module, optimizer: Any = None) -> list[str]:
        """Look at the dropped units that are in the model as zeros, and write zeros again where something is not.

        What has come back is written after every step from then on, and named once in a warning.

        Args:
            model: The model, or a copy of it.
            optimizer: The optimizer, if there still is one, for the zeros in its state.

        Returns:
            The names of the structures of which units had come back.
        """
        if names := self._units.restore(model, optimizer):
            self._warn_once("back", _COME_BACK.format(", ".join(names)))
        return names

    def sparsities(self) -> dict[str, float]:
        """The sparsity in force.

        Returns:
            `ffn2_sparsity` and `mha_sparsity`: the fractions of the units of the structures in the plans that are
            dropped; 0 where none are planned.
        """
        return find_sparsities(self.structures, self.masks)

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, as plain JSON data."""
        self.scores.refuse_bad_step()
        live = self.live
        masks = self.masks if live is None else live.masks
        zeros = {} if live is None else {name: live.masks[name] & ~mask for name, mask in self.masks.items()}
        return {
            "settings": to_state(self.settings),
            "steps": [list(plan.schedule.steps) for plan in self.plans],
            "events": list(self._events),
            "live": self.is_live,
            "dropped": {name: (~mask).nonzero().flatten().tolist() for name, mask in masks.items()},
            "zeros": {name: units.nonzero().flatten().tolist() for name, units in zeros.items() if units.any()},
            "unproven": sorted(self.unproven),
            "scores": {n: self._units.expand(n, scores).tolist() for n, scores in self.scores.smoothed.items()},
        }

    def _score(self, model: nn.Module, step: int = 0) -> None:
        scored: dict[CriterionName, list[Structure]] = {}
        for plan, events in zip(self.plans, self._events, strict=True):
            if plan.criterion != "magnitude" and events < len(plan.schedule.steps):
                scored.setdefault(plan.criterion, []).extend(self._units.current(s) for s in plan.structures)
        self.scores.take(model, scored, step)

    def _take_up(self, saved: Mapping[str, Any]) -> None:
        check_fit(saved, self.plans)
        zeros, unproven = saved.get("zeros", {}), saved.get("unproven", [])
        if not isinstance(zeros, dict) or not isinstance(unproven, list):
            raise damaged("its zeros or unproven structures are not as they were written")
        for dropped in ({name: saved["dropped"][name] for name in self.masks}, zeros):
            for name, mask in read_masks(dropped, self.masks).items():
                self.masks[name] &= mask
        if self.live is not None:
            self.live.take_up(self.masks, unproven, keeps_zeros=bool(zeros))
        scores = {name: torch.tensor(scores) for name, scores in saved["scores"].items()}
        self.scores.take_up({name: self._units.narrow(name, values) for name, values in scores.items()})
        self._events = list(saved["events"])

    def _due(self, step: int) -> list[bool]:
        """Which plans have a pruning step at a step, or one from before that is not done."""
        return [p.schedule.events_until(step) > done for p, done in zip(self.plans, self._events, strict=True)]

    def _select(self, model: nn.Module, plan: Plan, step: int) -> bool:
        """Drop units as the plan's schedule says; not yet if no optimizer step has been taken so far (fp16)."""
        scores = self.scores.smoothed
        if plan.criterion == "magnitude":
            scores = score_structures(
                model, [*map(self._units.current, plan.structures)], plan.criterion, self._shards
            )
            refuse_nonfinite(scores, step)
        elif not self.scores.can_select():
            return False
        self.scores.refuse_bad_step()
        agreed = agree_on({s.name: scores[s.name] for s in plan.structures})
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

    def _apply(self, model: nn.Module, optimizer: Any, calls: list[Call]) -> None:
        """Apply the masks, and keep the scores of what is left."""
        self._choose(model, optimizer)

        def apply() -> None:
            if self.live is None or self.live.keeps_zeros:
                self._units.apply(model, self.masks, optimizer)
            else:
                self._remove(self.live, model, optimizer, calls)

        self.scores.carry_over(apply, self._units.expand, lambda name, values: self._units.narrow(name, values))

    def _remove(self, live: LiveUnits, model: nn.Module, optimizer: Any, calls: list[Call]) -> None:
        """Let dropped units leave the model; where they cannot, they stay as zeros."""
        is_last, others = self.has_reached_target, self._find_others()
        if not remove_units(live, model, self.masks, optimizer, calls, self._required, is_last=is_last, others=others):
            if live.has_removed:
                live.keep_zeros()
            else:
                self._units = MaskedUnits(self.structures, self._shards)
            self._units.apply(model, self.masks, optimizer)
        if live.gap is not None:
            self._warn_once("gap", f"The removal of units is not proven on the batch of the training: {live.gap}.")
        if is_last and self.unproven:
            self._warn_once("end", f"The removal of units is not proven for {', '.join(sorted(self.unproven))}.")

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    def _choose(self, model: nn.Module, optimizer: Any) -> bool:
        """Take live compaction, before anything is dropped, if the optimizer's state can be sliced; once."""
        live, self._live = self._live, None
        if live is None or not can_slice_state(model, optimizer, self.structures, is_required=self._required):
            return False
        self._units = live
        return True
