"""Norms that stand between the layers of a structure."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .linear_layers import join
from .structure import Count, Member, blocks

_EPSILONS = ("variance_epsilon", "eps", "epsilon")


def find_epsilon(norm: nn.Module) -> str | None:
    """Find out whether a module is an RMS norm over its last dimension, by what it computes.

    Such a norm can be folded: without the units that were zero, the mean of the squares is over m instead of n values,
    which a larger weight and epsilon undo exactly: x / sqrt(s / n + e) = sqrt(n / m) x / sqrt(s / m + e n / m).

    Args:
        norm: A module with a weight of one dimension; not changed, and on any device.

    Returns:
        Name of the attribute that holds its epsilon, or None if it computes something else (takes the mean away, adds
        one to its weight, has a bias).
    """
    name = next((name for name in _EPSILONS if isinstance(norm.__dict__.get(name), float)), None)
    if name is None or dict(norm.named_buffers()) or [key for key, _ in norm.named_parameters()] != ["weight"]:
        return None
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator("cpu").manual_seed(0)
    size = probe.get_parameter("weight").shape[0]
    weight = torch.rand(size, generator=generator, device="cpu")
    value = torch.randn(1, size, generator=generator, device="cpu")
    probe.get_parameter("weight").data.copy_(weight)
    epsilon = 0.5
    setattr(probe, name, epsilon)
    with torch.no_grad():
        actual = probe(value)
    expected = weight * value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + epsilon)
    return name if torch.allclose(actual, expected, atol=1e-5) else None


def fold_norm(path: str, norm: nn.Module, epsilon: str, units: int) -> tuple[Member, Count]:
    """The member and the attribute of an RMS norm over all units together.

    Args:
        path: Dotted name of the norm.
        norm: The norm.
        epsilon: Name of the attribute that holds its epsilon.
        units: The number of units.

    Returns:
        The weight, whose positions belong to units in equal ranges, and the epsilon, which falls as units go.
    """
    index = blocks(units, norm.get_parameter("weight").shape[0] // units)
    value = getattr(norm, epsilon) * units
    return Member(join(path, "weight"), 0, index, "norm"), Count(path, epsilon, value, inverse=True)
