"""What a slim model was before any unit left it, read off what its modules note when they are cut or loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn

from ..modeling_hf_slim import DENSE_NUMBERS, DENSE_SHAPES, set_number, set_sizes
from ..parallel import share_tensors, whole_shape
from ..structures import Structure, find_structures, find_tensor, get_module, get_tensor, join, require_structures
from .module_copies import copy_modules

_UNPROVEN = "_hf_slim_unproven"
"""Attribute of a module that reads units some of which have left the model without proof."""


class DenseModel(NamedTuple):
    """A model with all units that it has ever had.

    Args:
        model: Its modules, without values where it has lost units; the model itself where it has lost none.
        structures: Its structures.
        sizes: For the names of the tensors that have become smaller the sizes that they had.
    """

    model: nn.Module
    structures: tuple[Structure, ...]
    sizes: dict[str, torch.Size]


def find_dense(model: nn.Module) -> DenseModel:
    """Find what a model was before any unit left it, whoever removed them: in this process, or before it was loaded.

    Of a model that was loaded, and whose config expresses its sizes by fields, that is what it was when it was loaded.

    Args:
        model: The model, whole, without adapters; not changed.

    Returns:
        The dense model.

    Raises:
        ValueError: If it has nothing to slim.
    """
    sizes = {
        join(path, leaf): torch.Size(shape)
        for path, module in model.named_modules()
        for leaf, shape in module.__dict__.get(DENSE_SHAPES, {}).items()
        if (tensor := find_tensor(module, leaf)) is not None and whole_shape(tensor) != torch.Size(shape)
    }
    dense = model
    if sizes:
        values = {id(p): _without_values(p) for p in model.parameters()}
        dense = copy_modules(model, share_tensors(model) | values)
        for name, size in sizes.items():
            tensor = get_tensor(dense, name)
            tensor.data = tensor.data.new_zeros(size)
            set_sizes(get_module(dense, name.rpartition(".")[0]))
        for module in dense.modules():
            _reset_numbers(module)
    return DenseModel(dense, require_structures(dense, find_structures(dense)), sizes)


def mark_unproven(model: nn.Module, structures: Iterable[Structure], names: Collection[str]) -> None:
    """Note with a model that structures have lost units without proof.

    Args:
        model: The model; the note is kept in a copy of it, and not in a file.
        structures: Its structures.
        names: The names of those that have.
    """
    for reader in _find_readers(model, (s for s in structures if s.name in names)):
        reader.__dict__[_UNPROVEN] = True


def find_unproven(model: nn.Module, structures: Iterable[Structure]) -> tuple[str, ...]:
    """Find the structures that have lost units without proof, since the model was built or loaded.

    Args:
        model: The model.
        structures: Its structures.

    Returns:
        Their names.
    """
    return tuple(s.name for s in structures if any(_UNPROVEN in m.__dict__ for m in _find_readers(model, (s,))))


def _find_readers(model: nn.Module, structures: Iterable[Structure]) -> list[nn.Module]:
    return [get_module(model, member.tensor.rpartition(".")[0]) for s in structures for member in s.outputs]


def _reset_numbers(module: nn.Module) -> None:
    """Let a module count the units that its config gives it."""
    for name, number in module.__dict__.get(DENSE_NUMBERS, {}).items():
        if number is None:  # there is such a number only where units are gone
            module.__dict__.pop(name, None)
        else:
            set_number(module, name, number)


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False)
