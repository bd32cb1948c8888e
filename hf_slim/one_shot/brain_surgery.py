"""Structured optimal brain surgery: which units of a layer's input to remove, and what the others take over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DAMPING = 1e-2
"""What is added to the diagonal of the second moment, relative to its mean."""
ROUNDS = 16
"""So many times channels are ranked anew while they are removed."""


@dataclass(eq=False)
class Reading:
    """What a layer reads of a structure, for the surgery.

    Args:
        weight: The layer's weight, float32 of shape `[outputs, inputs]`.
        moment: The damped second moment of its inputs, `[inputs, inputs]`.
        index: Which inputs belong to each unit, `[units, k]`, on the same device.
    """

    weight: torch.Tensor
    moment: torch.Tensor
    index: torch.Tensor


def damp(moment: torch.Tensor) -> torch.Tensor:
    """Add a part of its mean to the diagonal of a second moment, in place, so that it can be inverted."""
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)
    return moment


def rank_units(readings: Sequence[Reading], drop: int, *, one_by_one: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove units greedily, those of the least loss first, the others taking over what they can.

    With P the inverse of the damped second moment, removing the inputs S of a layer with weight W costs at least
    tr(W_S (P_SS)^-1 W_S^T), the growth of the mean squared error of its output (Frantar et al. 2023, ZipLM,
    arXiv:2302.04089; Tang et al. 2025, DarwinLM, arXiv:2502.07780). A unit costs the sum over the layers that read it.

    Args:
        readings: The layers that read the structure.
        drop: How many units to remove.
        one_by_one: Whether to rank anew after every unit (heads), or in 16 rounds (channels).

    Returns:
        The units in the order in which they go, int64 of shape `[drop]`, and what each adds to the loss, float64.
    """
    weights = [reading.weight.clone() for reading in readings]
    inverses = [_invert(reading.moment) for reading in readings]
    units = len(readings[0].index)
    alive = torch.ones(units, dtype=torch.bool, device=readings[0].index.device)
    gone: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    left, step = drop, 1 if one_by_one else max(1, math.ceil(drop / ROUNDS))
    while left:
        number = min(step, left)
        costs = sum(
            _unit_losses(weight, inverse, reading.index, alive)
            for weight, inverse, reading in zip(weights, inverses, readings, strict=True)
        )
        assert isinstance(costs, torch.Tensor)
        chosen = costs.masked_fill(~alive, math.inf).argsort(stable=True)[:number]
        loss = sum(
            _remove(weight, inverse, reading.index[chosen].flatten())
            for weight, inverse, reading in zip(weights, inverses, readings, strict=True)
        )
        shares = costs[chosen].clamp(min=0).cpu()
        gone.append(chosen.cpu())
        losses.append(loss * shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, loss / number))
        alive[chosen] = False
        left -= number
    if not gone:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return torch.cat(gone), torch.cat(losses).double()


def solve_kept(reading: Reading, dropped: torch.Tensor) -> torch.Tensor:
    """The weights that make up best for inputs that are removed: W_K + W_S C_SK (C_KK)^-1.

    Args:
        reading: The layer.
        dropped: Which inputs go, boolean of shape `[inputs]`.

    Returns:
        The layer's weight, float32 of shape `[outputs, inputs]`, zero where inputs go.
    """
    keep, gone = (~dropped).nonzero().flatten(), dropped.nonzero().flatten()
    rows = reading.moment[keep]
    update = torch.cholesky_solve(rows[:, gone] @ reading.weight[:, gone].t(), _factor(rows[:, keep]))
    weight = reading.weight.clone()
    weight[:, gone] = 0
    weight[:, keep] += update.t()
    return weight


def _invert(moment: torch.Tensor) -> torch.Tensor:
    """The inverse, in the memory of the Cholesky factor."""
    factor = _factor(moment)
    return torch.cholesky_inverse(factor, out=factor)


def _factor(moment: torch.Tensor) -> torch.Tensor:
    """The Cholesky factors; in float64 where rounding to float32 leaves none."""
    factor, failed = torch.linalg.cholesky_ex(moment)
    if failed.any():
        factor = torch.linalg.cholesky(moment.double()).float()
    return factor


def _unit_losses(
    weight: torch.Tensor, inverse: torch.Tensor, index: torch.Tensor, alive: torch.Tensor
) -> torch.Tensor:
    """What each unit costs by itself, shape `[units]`; of units that are gone anything."""
    units, size = index.shape
    if size == 1:
        where = index.flatten()
        return weight.square().sum(0)[where] / inverse.diagonal()[where].clamp(min=torch.finfo(torch.float32).tiny)
    blocks = inverse[index[:, :, None], index[:, None, :]]
    blocks[~alive] = torch.eye(size, device=blocks.device)
    columns = weight[:, index].permute(1, 2, 0)  # [units, size, outputs]
    return (torch.cholesky_solve(columns, _factor(blocks)) * columns).sum((1, 2))


def _remove(weight: torch.Tensor, inverse: torch.Tensor, where: torch.Tensor) -> float:
    """Take inputs out of a weight and an inverse, in place; gives what it costs."""
    rows = inverse[where]
    columns = weight[:, where]
    factor = _factor(rows[:, where])
    solved = torch.cholesky_solve(columns.t(), factor)  # (P_SS)^-1 W_S^T
    loss = float((solved * columns.t()).sum())
    weight.addmm_(solved.t(), rows, alpha=-1)
    inverse.addmm_(rows.t(), torch.cholesky_solve(rows, factor), alpha=-1)
    return loss
