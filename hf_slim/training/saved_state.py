"""What a checkpoint holds of a slimming run: whether it is as it was written, and of the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..arguments import SlimConfig
from ..structures import Masks
from .model_shape import ModelShape
from .plan import Plan, Settings, to_state

_MOST = torch.finfo(torch.float32).max
"""The largest finite score; no comparison with NaN holds."""


def check_saved(saved: Any) -> None:
    """Refuse what cannot have come from `Slimmer.to_state`.

    Args:
        saved: What a checkpoint holds.

    Raises:
        ValueError: If parts are missing or of other types.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "settings": (dict, list),
        "steps": (list,),
        "events": (list,),
        "live": (bool,),
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
    if not isinstance(saved.get("zeros", {}), dict) or not isinstance(saved.get("unproven", []), list):
        raise damaged("its zeros or unproven structures are not as they were written")


def take_loaded_shape(
    model: nn.Module, state: Any, max_steps: int, shape: ModelShape, obstacle: str | None, *, has_loaded: bool
) -> bool:
    """Give a model the shape that it had in a checkpoint of a loop.

    Args:
        model: The model; changed in place where units had left it in the checkpoint, or have left it since.
        state: What `Slimmer.state_dict` gave.
        max_steps: Optimizer steps of the whole training.
        shape: Which units the model has.
        obstacle: Why shapes cannot change in this training, if they cannot.
        has_loaded: Whether weights were loaded before.

    Returns:
        Whether the units in the model are those of the checkpoint, so that none would come of other weights.

    Raises:
        ValueError: If the state is damaged or of another model, or shapes cannot change.
    """
    check_saved(state)
    if type(state.get("step")) is not int:
        raise damaged("it has no step, as it is not of Slimmer.state_dict")
    if not 0 <= state["step"] <= max_steps:
        raise damaged(f"step {state['step']} is not among the max_steps={max_steps} of this training")
    if state["live"] and obstacle is not None:
        raise ValueError(
            f"The state is that of a training with live compaction, but {obstacle}. Resume on one device, or start "
            "another training from the model of the checkpoint, saved by save_pretrained."
        )
    masks = read_masks(state["dropped"], shape.masks) if state["live"] else {}
    masks = {name: masks.get(name, torch.ones_like(mask)) for name, mask in shape.masks.items()}
    has_units = all(mask.equal(shape.masks[name]) for name, mask in masks.items())
    has_sizes = all(mask.sum() == shape.masks[name].sum() for name, mask in masks.items())
    if has_sizes or shape.is_unnamed:  # the weights may be those of the checkpoint already
        shape.name_units(model, masks)
        return has_units or has_loaded
    shape.take(model, masks)
    return False


def damaged(what: str) -> ValueError:
    """The error for a state that is not as it was written."""
    return ValueError(
        f"The slimming state does not fit or is damaged: {what}. Resume from another checkpoint, with the model of "
        "the run."
    )


def read_masks(dropped_units: Mapping[str, Any], masks: Masks) -> dict[str, torch.Tensor]:
    """The masks that a checkpoint holds.

    Args:
        dropped_units: For names of structures the numbers of the dropped units, from what passed `check_saved`.
        masks: Masks of the model, of which only the names and lengths count.

    Returns:
        For each of the names a boolean tensor of shape `[units]`, True = keep.

    Raises:
        ValueError: If the model has no such structure, or other units.
    """
    read = {}
    for name, dropped in dropped_units.items():
        if name not in masks:
            raise damaged(f"{name!r} is in only one of the state and the model")
        units = len(masks[name])
        if not all(type(unit) is int and 0 <= unit < units for unit in dropped):
            raise damaged(f"the dropped units of {name} are not among its {units} units")
        read[name] = torch.ones(units, dtype=torch.bool)
        read[name][dropped] = False
    return read


def check_fit(saved: Mapping[str, Any], plan: Plan) -> None:
    """Refuse a saved state that does not fit what is to be removed now.

    Args:
        saved: What passed `check_saved`.
        plan: The plan of this run.

    Raises:
        ValueError: If the structures, the scores or the numbers of pruning steps do not fit.
    """
    units = {s.name: s.units for s in plan.structures}
    odd = sorted(set(units) - set(saved["dropped"]) if saved["live"] else set(saved["dropped"]) ^ set(units))
    if odd:  # what left the model in an earlier training may be there, too
        raise damaged(f"{odd[0]!r} is in only one of the state and the model")
    for name, scores in saved["scores"].items():
        if len(scores) != units.get(name) or not all(abs(score) <= _MOST for score in scores):
            raise damaged(f"the scores of {name} are not {units.get(name)} finite numbers")
    if len(saved["events"]) != len(plan.targets) or any(
        not 0 <= done <= len(target.schedule.steps)
        for done, target in zip(saved["events"], plan.targets, strict=False)
    ):
        raise damaged(f"{saved['events']} pruning steps of {len(plan.targets)} schedules are said to be done")


def refuse_other_settings(saved: Mapping[str, Any], settings: Settings) -> None:
    """Refuse to go on with other settings than those of a checkpoint.

    Args:
        saved: What passed `check_saved`.
        settings: The settings of this run.

    Raises:
        ValueError: If they differ; the message says in what.
    """
    given = json.loads(json.dumps(to_state(settings)))
    stored = saved["settings"]
    if isinstance(stored, dict):  # what is missing is younger than the checkpoint
        stored = {**{f.name: f.default for f in fields(SlimConfig)}, **stored}
    if stored != given:
        raise ValueError(
            f"The checkpoint was made with other slim settings: {_difference(stored, given)}. "
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
