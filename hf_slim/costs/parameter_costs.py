"""What structures cost in parameters: exactly, from their members."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..parallel import whole_shape
from ..structures import Structure, get_tensor
from .costs import Costs, Curve


def count_parameter_costs(model: nn.Module, structures: Iterable[Structure], sizes: Mapping[str, torch.Size]) -> Costs:
    """Count the parameters that belong to the units of structures.

    Args:
        model: The model; units may have left it while it trained.
        structures: The structures of the dense model.
        sizes: For tensors from which units have left the sizes that they had.

    Returns:
        The costs; a tied or shared parameter counts once.
    """
    shapes = {id(parameter): whole_shape(parameter) for parameter in model.parameters()}
    for name, size in sizes.items():
        if id(get_tensor(model, name)) in shapes:
            shapes[id(get_tensor(model, name))] = size
    curves = {s.name: _count_curve(model, s, shapes) for s in structures}
    return Costs("parameters", sum(shape.numel() for shape in shapes.values()), curves)


def _count_curve(model: nn.Module, structure: Structure, shapes: Mapping[int, torch.Size]) -> Curve:
    owned: dict[int, dict[int, int]] = {}  # for each parameter and dimension how many positions the units have
    for (name, dim), where in structure.positions(torch.ones(structure.units, dtype=torch.bool)).items():
        parameter = id(get_tensor(model, name))
        if parameter in shapes:
            owned.setdefault(parameter, {})[dim] = len(where.unique())

    def count(units: int) -> int:
        total = 0
        for parameter, dims in owned.items():
            size = list(shapes[parameter])
            for dim, positions in dims.items():
                size[dim] -= positions // structure.units * (structure.units - units)
            total += torch.Size(size).numel()
        return total

    is_straight = all(len(dims) == 1 for dims in owned.values())
    return Curve.through({n: count(n) for n in ((0, structure.units) if is_straight else range(structure.units + 1))})
