"""Copies of a model's weights that something beside the model keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from ..structures import Structure, get_tensor

_DEPTH = 5
"""How deep attributes and containers are looked into."""


def find_copy(model: nn.Module, structures: Iterable[Structure], holders: Iterable[Any]) -> str | None:
    """Say what keeps a copy of weights that are going to become smaller.

    Args:
        model: The model.
        structures: The structures that are going to lose units.
        holders: Callbacks and optimizers, whose attributes are looked through. What they keep is a copy if it has
            tensors of all the shapes of a structure, and is not the model's own.

    Returns:
        The reason, None if there is none.
    """
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for holder in holders:
        kept = Counter(t.shape for t in _find_kept(holder) if t.data_ptr() not in own)
        for structure in structures if kept else ():
            names = dict.fromkeys(member.tensor for member in structure.members)
            if Counter(get_tensor(model, name).shape for name in names) <= kept:
                return f"{type(holder).__name__} keeps a copy of the weights of {structure.name}"
    return None


def _find_kept(holder: Any) -> Iterator[torch.Tensor]:
    """The tensors that a callback or optimizer keeps besides the state of an optimizer."""
    seen: set[int] = set()
    for part in _find_parts(holder) if isinstance(holder, Optimizer) else vars(holder).values():
        yield from _find_tensors(part, _DEPTH, seen)


def _find_tensors(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    """The floating-point tensors in a value, its attributes, and theirs."""
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.dim():
            yield value
    elif isinstance(value, nn.Module):
        yield from (t for t in (*value.parameters(), *value.buffers()) if t.is_floating_point())
    else:
        for part in _find_parts(value):
            yield from _find_tensors(part, depth - 1, seen)


def _find_parts(value: Any) -> Iterable[Any]:
    """What is in a container or object; callbacks are looked at by themselves, and trainers hold no averages."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set)):
        return value
    if isinstance(value, Optimizer):
        return [part for name, part in vars(value).items() if name not in ("state", "param_groups")]
    if isinstance(value, (Trainer, TrainerCallback, type)) or type(value).__module__.partition(".")[0] in _OTHERS:
        return ()
    return getattr(value, "__dict__", {}).values()


_OTHERS = ("builtins", "torch", "transformers", "datasets", "numpy")
"""Packages whose objects keep no copies of weights, but for modules and optimizers."""
