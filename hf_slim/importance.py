"""How much each unit matters: one number per unit from the weights and gradients already there."""

from __future__ import annotations

import torch
from torch import nn

from .arguments import CriterionName
from .structures import Member, Structure, get_tensor

SMOOTHING = 0.9
"""What remains of the earlier score at each optimizer step."""


def score_units(model: nn.Module, structure: Structure, criterion: CriterionName) -> torch.Tensor:
    """Score the units of a structure at one optimizer step.

    `magnitude` is the mean |weight| and `snip_momentum` the mean |weight * gradient| over the unit's weights: the FFN2
    column of a channel; for a head the rows of query, key and value and the columns of the output projection, each
    averaged, then averaged together. `taylor` is |sum of weight * gradient| over the FFN2 or output-projection
    columns (Molchanov et al. 2019, arXiv:1906.10771; Michel et al. 2019, arXiv:1905.10650): how much the loss would
    change, to first order, without the unit.

    Args:
        model: The model that the structure was found in, with gradients except for `magnitude`.
        structure: One of its structures.
        criterion: `magnitude`, `snip_momentum` or `taylor`.

    Returns:
        float32 tensor of shape `[units]`; larger is more important.
    """
    if criterion == "taylor":
        return torch.stack([_taylor(model, member) for member in structure.outputs]).sum(0).abs()
    members = [m for m in structure.members if m.role == "output" or (structure.kind == "mha" and m.role == "input")]
    return torch.stack([_mean_size(model, member, criterion) for member in members]).mean(0)


def smooth_scores(previous: torch.Tensor | None, current: torch.Tensor) -> torch.Tensor:
    """Add a step's scores to those of the steps before: score <- 0.9 score + current.

    Args:
        previous: Smoothed scores so far, shape `[units]`, or None at the first step.
        current: This step's scores, shape `[units]`.

    Returns:
        The smoothed scores, shape `[units]`.
    """
    return current if previous is None else previous.to(current.device).mul(SMOOTHING).add_(current)


@torch.no_grad()
def _taylor(model: nn.Module, member: Member) -> torch.Tensor:
    weight = get_tensor(model, member.tensor)
    if weight.grad is None:
        return torch.zeros(len(member.index), device=weight.device)
    product = torch.einsum(_per_position(weight, member.dim), weight.detach(), weight.grad)
    return product.float()[member.index.to(weight.device)].sum(1)


@torch.no_grad()
def _mean_size(model: nn.Module, member: Member, criterion: CriterionName) -> torch.Tensor:
    weight = get_tensor(model, member.tensor)
    if criterion == "magnitude":
        total = weight.detach().abs().sum(dim=_others(weight, member.dim), dtype=torch.float32)
    elif weight.grad is None:
        return torch.zeros(len(member.index), device=weight.device)
    else:
        total = torch.einsum(_per_position(weight, member.dim), weight.detach().abs(), weight.grad.abs()).float()
    return total[member.index.to(weight.device)].sum(1) / (
        member.index.shape[1] * weight.numel() / weight.shape[member.dim]
    )


def _others(weight: torch.Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(weight.dim()) if d != dim)


def _per_position(weight: torch.Tensor, dim: int) -> str:
    letters = "abcdefgh"[: weight.dim()]
    return f"{letters},{letters}->{letters[dim]}"
