"""What an optimizer keeps for each position of a parameter: found, set to zero, cut down with the parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..parallel import Place, Shards, is_sharded, take_positions
from ..structures import Structure, get_tensor

Slices = Mapping[Place, Sequence[tuple[str, int]]]
"""For each place the keys of the optimizer's state, and the dimension of each that is the place's."""


def find_state_slices(optimizer: Any, model: nn.Module, places: Iterable[Place]) -> tuple[Slices, dict[Place, str]]:
    """Find what an optimizer keeps for each position along dimensions of parameters.

    That is every tensor of the parameter's shape (momentum, variance), and with factored second moments (Adafactor:
    Shazeer and Stern 2018, arXiv:1804.04235) the factor that has the dimension. Numbers, and tensors of one element,
    hold for the parameter as a whole.

    Args:
        optimizer: A torch optimizer, in whatever accelerate wraps around it; None for no state at all.
        model: The model.
        places: Names of parameters and dimensions; buffers may be among them, which optimizers do not know.

    Returns:
        The states; and for each place of which a state cannot be told apart by position, or is not known, the reason.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    held = {id(p) for group in inner.param_groups for p in group["params"]} if inner is not None else set()
    own = {id(parameter) for parameter in model.parameters()}
    slices: dict[Place, list[tuple[str, int]]] = {}
    problems: dict[Place, str] = {}
    for name, dim in places:
        parameter = get_tensor(model, name)
        slices[name, dim] = []
        if inner is None:
            continue
        if id(parameter) not in held:
            if parameter.requires_grad and not held <= own:  # it may hold copies in place of the model's parameters
                problems[name, dim] = f"{type(inner).__name__} has no {name} in its param_groups"
            continue
        for key, value in inner.state.get(parameter, {}).items():
            where = _find_dimension(key, value, parameter.shape, dim)
            if where is None:
                is_tensor = isinstance(value, torch.Tensor)
                kind = f"{value.dtype} of shape {tuple(value.shape)}" if is_tensor else f"a {type(value).__name__}"
                problems[name, dim] = (
                    f"{type(inner).__name__} keeps the state {key!r} ({kind}) for {name}, which cannot be sliced like "
                    f"the parameter of shape {tuple(parameter.shape)}"
                )
            elif where >= 0:
                slices[name, dim].append((key, where))
    return slices, problems


def keep_state(optimizer: Any, parameter: torch.Tensor, slices: Sequence[tuple[str, int]], keep: torch.Tensor) -> None:
    """Cut an optimizer's state down to some positions.

    Args:
        optimizer: The optimizer; its state is changed.
        parameter: The parameter, whose own data may have been cut already.
        slices: From `find_state_slices`, asked for before the parameter was cut.
        keep: Boolean tensor of shape `[size of the dimension]` on the CPU, True for the positions that stay.
    """
    state = getattr(optimizer, "optimizer", optimizer).state[parameter] if slices else {}
    for key, dim in slices:
        state[key] = take_positions(state[key], dim, keep)


def zero_state(
    optimizer: Any, parameter: torch.Tensor, slices: Sequence[tuple[str, int]], where: torch.Tensor, shards: Shards
) -> None:
    """Set what is of the parameter's own shape in an optimizer's state to zero at some positions.

    Factors stay: they are means of squares, which do not move a weight whose gradient is zero.

    Args:
        optimizer: The optimizer; its state is changed.
        parameter: The parameter.
        slices: From `find_state_slices`.
        where: The positions, from `Shards.find_own`.
        shards: Where the parameter's values are, and those of the state in the same way.
    """
    state = getattr(optimizer, "optimizer", optimizer).state[parameter] if slices else {}
    for key, dim in slices:
        if state[key].shape == parameter.shape:
            shards.write_zeros(state[key], dim, where)


def has_state(optimizer: Any) -> bool:
    """Whether an optimizer keeps anything yet; most begin at their first step."""
    return bool(getattr(optimizer, "optimizer", optimizer).state)


def refuse_other_sizes(optimizer: Any) -> None:
    """Refuse an optimizer whose state is larger than its parameters, as it is when a model was made smaller since.

    Fused optimizers do not look at shapes, and would go on with what belongs to other weights.

    Args:
        optimizer: A torch optimizer, in whatever accelerate wraps around it; None for none.

    Raises:
        ValueError: If there is such a state.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups if inner is not None else ():
        for parameter in group["params"]:
            for key, value in inner.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor) or value.dim() != parameter.dim():
                    continue
                if any(size > left for size, left in zip(value.shape, parameter.shape, strict=True)):
                    raise ValueError(
                        f"The model was made smaller after {type(inner).__name__} had begun: its state {key!r} has "
                        f"the shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}. Train on "
                        "with an optimizer that is made anew (trainer.optimizer = trainer.lr_scheduler = None)."
                    )


def refuse_other_units(optimizer: Any, model: nn.Module, structures: Iterable[Structure]) -> None:
    """Refuse an optimizer whose state is of as many units of a structure as the model has not.

    That is so where the state of a checkpoint was loaded without its weights. What an optimizer keeps in a size of its
    own does not say the same number of units for all tensors of a structure.

    Args:
        optimizer: A torch optimizer, in whatever accelerate wraps around it.
        model: The model.
        structures: Its structures, as they are now.

    Raises:
        RuntimeError: If there is such a structure.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for structure in structures:
        counts: dict[int, str] = {}
        for (name, dim), where in structure.positions(torch.ones(structure.units, dtype=torch.bool)).items():
            parameter = get_tensor(model, name)
            for key, value in inner.state.get(parameter, {}).items():
                count = _count_units(value, parameter.shape, dim, structure.units, len(where) // structure.units)
                if count is not None:
                    counts.setdefault(count, f"its state {key!r} for {name} has the shape {tuple(value.shape)}")
        if len(counts) == 1 and structure.units not in counts:
            ((count, where_told),) = counts.items()
            raise RuntimeError(
                f"The state of {type(inner).__name__} is that of a model with {count} units in {structure.name}, "
                f"which has {structure.units} here: {where_told}. Weights, optimizer and Slimmer have to be of "
                "the same checkpoint: load all three, or leave the optimizer's state as it was made."
            )


def _count_units(value: Any, shape: torch.Size, dim: int, units: int, size: int) -> int | None:
    """How many units, each of some positions along a dimension, a state has of a parameter with so many."""
    if not isinstance(value, torch.Tensor) or value.dim() != len(shape) or value.numel() == 1:
        return None
    if any(own != whole for d, (own, whole) in enumerate(zip(value.shape, shape, strict=True)) if d != dim):
        return None
    gone, rest = divmod(shape[dim] - value.shape[dim], size)
    return units - gone if rest == 0 else None


def _find_dimension(key: str, value: Any, shape: torch.Size, dim: int) -> int | None:
    """The dimension of a state that is a dimension of its parameter; -1 if it has none, None if that is unknown."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return -1
    if not isinstance(value, torch.Tensor) or not (type(value) in (torch.Tensor, nn.Parameter) or is_sharded(value)):
        return None
    if value.numel() == 1:
        return -1
    if not value.is_floating_point():
        return None
    if len(value.shape) == len(shape) and all(
        size in (1, whole) for size, whole in zip(value.shape, shape, strict=True)
    ):
        return dim if value.shape[dim] == shape[dim] else -1
    missing = [d for d in range(len(shape)) if value.shape == shape[:d] + shape[d + 1 :]]
    if len(missing) > 1:  # a square parameter: only the name tells what was averaged over
        named = {"row": len(shape) - 1, "col": len(shape) - 2}
        missing = [d for word, d in named.items() if word in key and d in missing]
    if len(missing) != 1:
        return None
    return -1 if missing[0] == dim else dim - (missing[0] < dim)
