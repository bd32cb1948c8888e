"""The methods of one-shot slimming: what each unit is worth, and what is done to those that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.utils import logging

from ..parallel import find_device, find_shards
from ..structures import Structure, get_tensor
from ..training import Plan, score_structures
from .brain_surgery import rank_units
from .calibration_batches import Calibration, naming_batch
from .calibration_pass import Found, calibrating, collect_squares, visit_layers
from .kept_weights import KeptWeights
from .output_error import OutputError
from .unit_removal import choose_units, drop_units, make_readings, mask_weights, solve_weights, trying

MethodName = Literal["obs", "magnitude", "taylor", "flap"]
Masks = dict[str, torch.Tensor]
Scores = dict[str, torch.Tensor]
_TRIED = 0.25
"""Fraction of a structure's units without which the model is run to see what the layer's error does to its outputs."""
Method = Callable[[nn.Module, Plan, Calibration, KeptWeights], Masks]
"""Zeroes units of a model as the plan says, and changes what stays, which is kept before; gives the masks."""


def _slim_by_surgery(model: nn.Module, plan: Plan, data: Calibration, kept: KeptWeights) -> Masks:
    """Layer by layer, the units of the least loss go and the others take over (optimal brain surgery).

    With the scope `global` the layers are ranked first, on what the dense model gives.
    """
    masks: Masks = {}

    def operate(structure: Structure, found: Found) -> None:
        means = {reader: moments.mean for reader, moments in found.items()}
        readings = make_readings(model, found)
        drop = int((~masks[structure.name]).sum())
        mask = masks[structure.name] = choose_units(structure, readings, drop)
        drop_units(model, structure, mask, kept, solve_weights(readings, mask), means)

    with calibrating(model):
        is_global = any(target.scope == "global" for target in plan.targets)
        alike = {s.name: torch.zeros(s.units) for s in plan.structures}
        scores = _rank_layers(model, plan, data) if is_global else alike
        masks |= _select(plan, scores)
        left = [s for s in plan.structures if not masks[s.name].all()]
        visit_layers(model, left, data, operate, "Slimming layers")
    return masks


def _slim_by_fluctuation(model: nn.Module, plan: Plan, data: Calibration, kept: KeptWeights) -> Masks:
    """The channels that vary least, times the squared norms of their weights, go; biases make up for their means.

    After FLAP (An et al. 2024, arXiv:2312.11983), whose scores are standardized in each layer. Layers without a bias
    get none.
    """
    with calibrating(model):
        found = collect_squares(model, plan.structures, data)
    means = {reader: moments.mean for part in found.values() for reader, moments in part.items()}
    scores = {structure.name: _score_by_fluctuation(model, part) for structure, part in found.items()}
    masks = _select(plan, scores)
    for structure, part in found.items():
        mask = masks[structure.name]
        drop_units(model, structure, mask, kept, mask_weights(model, part, mask), means)
    return masks


def _slim_by_magnitude(model: nn.Module, plan: Plan, data: Calibration, kept: KeptWeights) -> Masks:
    """The units of the smallest weights go; the data only serve to compare."""
    return _drop(model, plan, kept, score_structures(model, plan.structures, "magnitude", find_shards(model)))


def _slim_by_gradient(model: nn.Module, plan: Plan, data: Calibration, kept: KeptWeights) -> Masks:
    """The units of the smallest first-order term of the loss go, summed over the batches."""
    scores: Scores = {}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    device = find_device(model)
    try:
        with calibrating(model), torch.enable_grad():
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
            scored = {m.tensor for s in plan.structures for m in s.outputs}
            for number, batch in enumerate(logging.tqdm(data.batches, desc="Calibrating")):
                for name in scored:
                    weight = get_tensor(model, name)
                    weight.requires_grad_(True).grad = None
                _find_loss(model, send_to_device(dict(batch), device), number).backward()
                for name, score in score_structures(model, plan.structures, "taylor", find_shards(model)).items():
                    scores[name] = scores[name] + score if name in scores else score
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed).grad = gradient
    return _drop(model, plan, kept, scores)


METHODS: Mapping[str, Method] = {
    "obs": _slim_by_surgery,
    "magnitude": _slim_by_magnitude,
    "taylor": _slim_by_gradient,
    "flap": _slim_by_fluctuation,
}


def _select(plan: Plan, scores: Mapping[str, torch.Tensor]) -> Masks:
    whole = {s.name: torch.ones(s.units, dtype=torch.bool) for s in plan.structures}
    masks: Masks = {}
    for target in plan.targets:
        masks |= target.select(scores, whole, 1)
    return masks


def _drop(model: nn.Module, plan: Plan, kept: KeptWeights, scores: Mapping[str, torch.Tensor]) -> Masks:
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"The scores of {name} are not finite: its weights or their gradients are not.")
    masks = _select(plan, scores)
    for structure in plan.structures:
        drop_units(model, structure, masks[structure.name], kept)
    return masks


def _find_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    with naming_batch(model, batch, number):
        outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if loss is None:
        raise ValueError(
            f"method='taylor' needs the loss of the model, and {type(model).__name__} gives none for "
            f"{', '.join(batch)}: add labels to the data set, or use method='obs'."
        )
    if not loss.isfinite():
        raise ValueError(f"The loss of calibration batch {number} is {float(loss)}: look at the data and the model.")
    return loss


def _rank_layers(model: nn.Module, plan: Plan, data: Calibration) -> Scores:
    """What units of all layers are worth, so that they can be ranked together.

    That is what a unit's going adds to the squared error of the layer's output when all units of the structure go
    greedily, times what such an error does to the outputs of the model: measured by running the model without the
    first quarter of the structure's units. Errors relative to the energy of the layer's output were a worse measure
    where it was tried, and errors as they are a still worse one, which empties the first layers: their outputs are
    small.
    """
    scores: Scores = {}
    error = OutputError(model, send_to_device(dict(data.batches[0]), find_device(model)))

    def score(structure: Structure, found: Found) -> None:
        scores[structure.name] = _score_by_surgery(model, structure, found, error)

    visit_layers(model, plan.structures, data, score, "Ranking layers")
    return scores


def _score_by_surgery(model: nn.Module, structure: Structure, found: Found, error: OutputError) -> torch.Tensor:
    means = {reader: moments.mean for reader, moments in found.items()}
    readings = make_readings(model, found)
    order, losses = rank_units([*readings.values()], structure.units, one_by_one=structure.kind == "mha")
    first = max(1, round(_TRIED * structure.units))
    mask = torch.ones(structure.units, dtype=torch.bool)
    mask[order[:first]] = False
    weights = solve_weights(readings, mask)
    readings.clear()
    with trying(model, weights, means):
        effect = error.measure()
    scores = torch.empty(structure.units, dtype=torch.float64)
    scores[order] = losses * (effect / max(float(losses[:first].sum()), torch.finfo(torch.float32).tiny))
    return scores


def _score_by_fluctuation(model: nn.Module, found: Found) -> torch.Tensor:
    parts = []
    for reader, moments in found.items():
        worth = moments.take(centred=True) * reader.view_weight(model).float().square().sum(0)
        parts.append(reader.member.sum_units(worth))
    scores = torch.stack(parts).sum(0)
    return (scores - scores.mean()) / scores.std().clamp(min=torch.finfo(torch.float32).tiny)
