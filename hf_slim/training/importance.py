"""How much each unit matters: one number per unit from the weights and gradients already there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..arguments import CriterionName
from ..parallel import Shards, whole_shape
from ..structures import Member, Structure, get_tensor

SMOOTHING = 0.9
"""What remains of the earlier score at each optimizer step."""
LONG_SMOOTHING = 0.99
"""The same for squares, a few of which would outweigh all others."""


def score_structures(
    model: nn.Module, structures: Iterable[Structure], criterion: CriterionName, shards: Shards
) -> dict[str, torch.Tensor]:
    """Score the units of structures at one optimizer step.

    `magnitude` is the mean |weight| and `snip_momentum` the mean |weight * gradient| over the unit's weights: the FFN2
    column of a channel; for a head the rows of query, key and value and the columns of the output projection, each
    averaged, then averaged together. `taylor` is |sum of weight * gradient| over the FFN2 or output-projection
    columns (Molchanov et al. 2019, arXiv:1906.10771; Michel et al. 2019, arXiv:1905.10650): how much the loss would
    change, to first order, without the unit. `fisher` is the square of that sum: smoothed over steps, the diagonal of
    the empirical Fisher information of a mask over the units (Kwon et al. 2022, arXiv:2204.09656), by which what
    several units are worth is a sum, also of channels and heads.

    Args:
        model: The model that the structures were found in, with gradients except for `magnitude`. Where its tensors
            are sharded, every process has to call this.
        structures: Its structures.
        criterion: `magnitude`, `snip_momentum`, `taylor` or `fisher`.
        shards: Where its weights and gradients are.

    Returns:
        For each structure's name a float32 tensor of shape `[units]`; larger is more important.
    """
    scored = {s.name: _scored_members(s, criterion) for s in structures}
    places = dict.fromkeys((m.tensor, m.dim) for members in scored.values() for m in members)
    sums = shards.sum_products(model, places, _PRODUCTS[criterion], gradient=criterion != "magnitude")
    scores = {}
    for name, members in scored.items():
        parts = [m.sum_units(sums[m.tensor, m.dim]) for m in members]
        if criterion in _FIRST_ORDER:
            whole = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
            scores[name] = _FIRST_ORDER[criterion](whole)
        else:
            sizes = [_weights_per_unit(model, m) for m in members]
            scores[name] = torch.stack([part / size for part, size in zip(parts, sizes, strict=True)]).mean(0)
    return scores


def smooth_scores(previous: torch.Tensor | None, current: torch.Tensor, smoothing: float = SMOOTHING) -> torch.Tensor:
    """Add a step's scores to those of the steps before: score <- 0.9 score + current.

    What corrects the bias of the first steps would be one factor for all units, and ranks nothing otherwise.

    Args:
        previous: Smoothed scores so far, shape `[units]`, or None at the first step.
        current: This step's scores, shape `[units]`.
        smoothing: What remains of the earlier score.

    Returns:
        The smoothed scores, shape `[units]`.
    """
    return current if previous is None else previous.to(current.device).mul(smoothing).add_(current)


_PRODUCTS: dict[CriterionName, Callable[..., torch.Tensor]] = {
    "magnitude": torch.abs,
    "snip_momentum": lambda weight, gradient: weight.mul(gradient).abs_(),
    "taylor": torch.mul,
    "fisher": torch.mul,
}
"""What is summed up for a score, element by element."""
_FIRST_ORDER: dict[CriterionName, Callable[[torch.Tensor], torch.Tensor]] = {
    "taylor": torch.abs,
    "fisher": torch.square,
}
"""What a score is of the sum over a unit's columns."""


def _scored_members(structure: Structure, criterion: CriterionName) -> list[Member]:
    whole_head = structure.kind == "mha" and criterion not in _FIRST_ORDER
    return [m for m in structure.members if m.role == "output" or (whole_head and m.role == "input")]


def _weights_per_unit(model: nn.Module, member: Member) -> float:
    weight = get_tensor(model, member.tensor)
    shape = whole_shape(weight)
    return member.index.shape[1] * shape.numel() / shape[member.dim]
