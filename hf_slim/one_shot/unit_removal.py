"""What one-shot slimming does to weights: units become zero, and what stays takes over what it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..compaction import zero_units
from ..structures import Structure, get_tensor
from .brain_surgery import Reading, damp, rank_units, solve_kept
from .calibration_pass import Found
from .kept_weights import KeptWeights
from .reading_layers import Reader

Weights = Mapping[Reader, torch.Tensor]
"""For the layers that read a structure new weights, `[outputs, inputs]`."""


def make_readings(model: nn.Module, found: Found) -> dict[Reader, Reading]:
    """Make ready for surgery what layers read; of stacked experts those that no token was routed to are left out.

    With a bias the second moment is the one about the mean, since the bias takes over what is lost of the mean. The
    moments are used up.

    Args:
        model: The model.
        found: What the readers of a structure read.

    Returns:
        What the surgery takes, for each reader.
    """
    readings = {}
    for reader, moments in found.items():
        if moments.rows:
            weight = reader.view_weight(model).float()
            moment = damp(moments.take(centred=reader.bias is not None))
            readings[reader] = Reading(weight, moment, reader.member.index.to(weight.device))
    return readings


def choose_units(structure: Structure, readings: Mapping[Reader, Reading], drop: int) -> torch.Tensor:
    """Choose the units of a structure to remove by surgery.

    Args:
        structure: The structure.
        readings: What its readers read.
        drop: How many units to remove.

    Returns:
        A mask on the CPU, True = keep.
    """
    order, _ = rank_units([*readings.values()], drop, one_by_one=structure.kind == "mha")
    mask = torch.ones(structure.units, dtype=torch.bool)
    mask[order] = False
    return mask


def solve_weights(readings: Mapping[Reader, Reading], mask: torch.Tensor) -> Weights:
    """The weights of the layers that read a structure, after surgery.

    Args:
        readings: What its readers read.
        mask: The units to keep.

    Returns:
        New weights, for each reader.
    """
    weights = {}
    for reader, reading in readings.items():
        dropped = torch.zeros(reading.weight.shape[1], dtype=torch.bool, device=reading.weight.device)
        dropped[reader.member.index[~mask].flatten().to(dropped.device)] = True
        weights[reader] = solve_kept(reading, dropped)
    return weights


def mask_weights(model: nn.Module, found: Found, mask: torch.Tensor) -> Weights:
    """The weights of the layers that read a structure, zero where units go and otherwise as they are.

    Args:
        model: The model.
        found: What its readers read.
        mask: The units to keep.

    Returns:
        New weights, for each reader.
    """
    weights = {}
    for reader in found:
        weight = reader.view_weight(model).float().clone()
        weight[:, reader.member.index[~mask].flatten().to(weight.device)] = 0
        weights[reader] = weight
    return weights


@torch.no_grad()
def drop_units(
    model: nn.Module,
    structure: Structure,
    mask: torch.Tensor,
    kept: KeptWeights,
    weights: Weights | None = None,
    means: Mapping[Reader, torch.Tensor] | None = None,
) -> None:
    """Zero the units that a mask drops, with new weights where there are some, and biases that make up for the mean.

    An RMS norm over all units would see zeros in place of what it saw before and make the others larger by the root of
    units / kept units; its weight is divided by that, so that they stay what they were.

    Args:
        model: The model; changed in place.
        structure: One of its structures.
        mask: The units to keep, on the CPU.
        kept: Keeps what is changed.
        weights: New weights of the layers that read the units; none if they only become zero.
        means: The means of what the layers read, for their biases.
    """
    readers = (*(weights or ()), *(means or ()))
    kept.keep([*(m.tensor for m in structure.members), *(reader.bias for reader in readers if reader.bias)])
    _write(model, weights or {}, means or {})
    zero_units(model, [structure], {structure.name: mask})
    for member in structure.members:
        if member.role == "norm":
            get_tensor(model, member.tensor).mul_((int(mask.sum()) / structure.units) ** 0.5)


@contextmanager
def trying(model: nn.Module, weights: Weights, means: Mapping[Reader, torch.Tensor]) -> Iterator[None]:
    """Give the layers that read a structure new weights, and afterwards the old ones.

    Args:
        model: The model.
        weights: New weights of the layers.
        means: The means of what they read.

    Yields:
        Nothing.
    """
    views = [view for reader in weights for view in (reader.view_weight(model), reader.view_bias(model))]
    before = [(view, view.clone()) for view in views if view is not None]
    try:
        _write(model, weights, means)
        yield
    finally:
        for view, values in before:
            view.copy_(values)


@torch.no_grad()
def _write(model: nn.Module, weights: Weights, means: Mapping[Reader, torch.Tensor]) -> None:
    """New weights, and what is lost of the means of the outputs into the biases."""
    for reader, weight in weights.items():
        view, bias = reader.view_weight(model), reader.view_bias(model)
        if bias is not None and reader in means:
            bias.add_((view.float() - weight) @ means[reader])
        view.copy_(weight)
