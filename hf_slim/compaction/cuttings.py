"""What is cut from a model, kept as long as it may have to be put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling_hf_slim import ConfigView
from ..parallel import Place, change_tensor, take_positions
from ..structures import Masks, Structure, get_tensor
from .optimizer_state import find_state_slices


class _Piece(NamedTuple):
    """What a tensor loses along one dimension, after it has been cut along those before.

    Args:
        dim: The dimension.
        keep: Boolean tensor of shape `[size of the dimension]` on the CPU, True for the positions that stay.
        values: The others.
    """

    dim: int
    keep: torch.Tensor
    values: torch.Tensor


class Cuttings:
    """Copies of what masks drop, and of all that changes with the number of units.

    Args:
        model: The model, before anything is zeroed or cut.
        structures: The structures that are going to lose units.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        optimizer: The optimizer, whose state is going to be cut as well; None for none.
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure], masks: Masks, optimizer: Any = None) -> None:
        """See the class."""
        self._model = model
        self._state = getattr(optimizer, "optimizer", optimizer).state if optimizer is not None else {}
        keeps = _find_keeps(model, structures, masks)
        slices, _ = find_state_slices(optimizer, model, keeps)
        cuts: dict[str, dict[int, torch.Tensor]] = {}
        states: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
        for (name, dim), keep in keeps.items():
            cuts.setdefault(name, {})[dim] = keep
            for key, where in slices[name, dim]:
                states.setdefault((name, key), {})[where] = keep
        self._tensors = {name: _take_pieces(get_tensor(model, name), cut) for name, cut in cuts.items()}
        self._states = {
            (name, key): _take_pieces(self._state[get_tensor(model, name)][key], cut)
            for (name, key), cut in states.items()
        }
        self._attributes = [(module, type(module), dict(vars(module))) for module in model.modules()]
        self._configs = [(config, _copy_fields(config)) for config in _find_configs(model)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the model, its config and the optimizer's state what they were, whether all has been cut or not."""
        for name, pieces in self._tensors.items():
            change_tensor(self._model, name, partial(_join, pieces=pieces))
        for (name, key), pieces in self._states.items():
            state = self._state[get_tensor(self._model, name)]
            state[key] = _join(state[key], pieces)
        for owner, fields in self._configs:
            vars(owner).clear()
            vars(owner).update(fields)
        for module, kind, attributes in self._attributes:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)


def _find_keeps(model: nn.Module, structures: Sequence[Structure], masks: Masks) -> dict[Place, torch.Tensor]:
    keeps: dict[Place, torch.Tensor] = {}
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            if len(where):
                size = get_tensor(model, name).shape[dim]
                keep = keeps.setdefault((name, dim), torch.ones(size, dtype=torch.bool, device="cpu"))
                keep[where] = False
    return keeps


def _take_pieces(tensor: torch.Tensor, cut: dict[int, torch.Tensor]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for dim, keep in cut.items():
        values = take_positions(tensor.detach(), dim, ~keep)
        for before in pieces:
            values = take_positions(values, before.dim, before.keep)
        pieces.append(_Piece(dim, keep, values))
    return pieces


def _join(tensor: torch.Tensor, pieces: Sequence[_Piece]) -> torch.Tensor:
    """The whole tensor, from what is left of it or from one with other values where it is going to be cut."""
    for dim, keep, _ in pieces:
        if tensor.shape[dim] == len(keep):
            tensor = take_positions(tensor, dim, keep)
    for dim, keep, values in reversed(pieces):
        whole = tensor.new_empty((*tensor.shape[:dim], len(keep), *tensor.shape[dim + 1 :]))
        for part, mask in ((tensor, keep), (values, ~keep)):
            whole.index_copy_(dim, mask.nonzero().flatten().to(whole.device), part)
        tensor = whole
    return tensor


def _find_configs(model: nn.Module) -> Iterator[Any]:
    """The configs that modules read, and their own views of them."""
    waiting = [vars(module) for module in model.modules()]
    found: set[int] = set()
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, (PreTrainedConfig, ConfigView)) and id(value) not in found:
                found.add(id(value))
                waiting.append(vars(value))
                yield value


def _copy_fields(config: Any) -> dict[str, Any]:
    """The fields of a config; a record among them may be changed in place."""
    return {name: deepcopy(value) if isinstance(value, dict) else value for name, value in vars(config).items()}
