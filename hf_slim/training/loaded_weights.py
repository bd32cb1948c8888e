"""Weights of a checkpoint that were loaded into a model before anybody said which units had left it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..parallel import whole_shape
from ..structures import Structure, get_tensor


class WeightsHook:
    """Gives a model the sizes of the weights that are about to be loaded; which units these are is said later.

    What saves a training at large loads the model first, as `Accelerator.load_state` does. In a copy or pickle of the
    model it does nothing.

    Args:
        take: Gives the model the sizes; a method, whose owner the hook does not keep.
    """

    def __init__(self, take: Callable[[Mapping[str, Any], str], None] | None = None) -> None:
        """See the class."""
        self._take = None if take is None else weakref.WeakMethod(take)

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing is left of it in a copy or a pickle."""
        return WeightsHook, ()

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """Called by `load_state_dict` of the model."""
        take = self._take() if self._take is not None else None
        if take is not None:
            take(state_dict, prefix)


class AwaitedWeights:
    """Whether the weights are still to come that belong to a state; told by what writes into the tensors."""

    def __init__(self) -> None:
        """None are awaited."""
        self._seen: dict[str, tuple[int, int]] | None = None

    def are_missing(self, model: nn.Module) -> bool:
        """Whether weights are awaited, and nothing has written any since."""
        return self._seen is not None and self._seen == _find_versions(model, self._seen)

    def wait(self, model: nn.Module, names: Iterable[str]) -> None:
        """Wait for the weights of these names."""
        self._seen = _find_versions(model, names)

    def end(self) -> None:
        """Wait no longer."""
        self._seen = None


def count_units(
    model: nn.Module,
    structures: Iterable[Structure],
    sizes: Mapping[str, torch.Size],
    weights: Mapping[str, Any],
    prefix: str,
) -> dict[str, int | None]:
    """Count the units that structures have in weights, by the sizes of tensors that are theirs alone.

    Args:
        model: The model.
        structures: Its structures as they were before anything was dropped.
        sizes: The sizes that tensors had then, of those that are smaller now.
        weights: The weights.
        prefix: What stands before the model's names in theirs.

    Returns:
        For each structure's name the number of its units, None where that cannot be told.
    """
    owned = {s.name: s.positions(torch.ones(s.units, dtype=torch.bool)) for s in structures}
    owners = Counter(place for places in owned.values() for place in places)
    counts: dict[str, int | None] = dict.fromkeys(owned)
    for structure in structures:
        for (name, dim), where in owned[structure.name].items():
            weight = weights.get(prefix + name)
            dense = sizes.get(name, whole_shape(get_tensor(model, name)))
            if owners[name, dim] > 1 or not isinstance(weight, torch.Tensor) or weight.dim() != len(dense):
                continue
            gone, rest = divmod(dense[dim] - weight.shape[dim], len(where) // structure.units)
            if rest == 0 and 0 <= gone < structure.units:
                counts[structure.name] = structure.units - gone
            break
    return counts


def _find_versions(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Which tensors they are, and how often something was written into each."""
    tensors = {name: get_tensor(model, name) for name in names}
    return {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}
