"""Copies of the modules of a model, whatever becomes of their weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .config_record import find_pretrained

_OWN = frozenset(nn.Module().__dict__)


def copy_modules(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy the modules of a model.

    What else a module around the transformers models holds is shared with the copy: it may hold on to a trainer and
    its data.

    Args:
        model: The model.
        memo: As for `copy.deepcopy`: what stands for tensors in the copy, by their ids.

    Returns:
        The copy.
    """
    inside = set()
    for part in find_pretrained(model):
        copy.deepcopy(part, memo)
        inside |= set(part.modules())
    for module in model.modules():
        if module not in inside:
            for name, value in module.__dict__.items():
                if name not in _OWN and id(value) not in memo and not isinstance(value, nn.Module):
                    memo[id(value)] = value
    return copy.deepcopy(model, memo)
