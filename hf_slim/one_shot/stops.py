"""Where forward passes have to wait: the modules around structures, in the order in which a model runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..proof import RUN_ERRORS
from ..structures import Structure, get_module
from .reading_layers import Gathered, Reader, Watch

_MOST = 3
"""So many structures may be in one module that passes wait at: a decoder block with an encoder has as many."""


@dataclass(frozen=True, eq=False)
class Stop:
    """A module at which all passes wait, and the structures in it, in the order in which they are read.

    Args:
        module: The module.
        structures: The structures, each with whether its layers are read once in a pass, so that nothing of the module
            is needed after that.
    """

    module: nn.Module
    structures: tuple[tuple[Structure, bool], ...]


def find_stops(
    model: nn.Module, readers: Mapping[Structure, Sequence[Reader]], sample: Mapping[str, Any]
) -> list[Stop]:
    """Find where to wait, from one pass of one sample.

    A pass waits at the largest module around a structure that is run once in a pass and holds no more than three
    structures, which is a block for most models: what waits there is small. Where layers are shared or several blocks
    share a structure, it is the smallest module around all of it that is run once.

    Args:
        model: The model, in evaluation mode.
        readers: The structures and the layers that read their units.
        sample: One sample.

    Returns:
        The stops in the order of the pass.

    Raises:
        ValueError: If the model cannot run on the sample.
    """
    calls: dict[nn.Module, int] = {}
    seen: dict[Reader, int] = {}
    owner = {reader: structure for structure, found in readers.items() for reader in found}

    def note(reader: Reader, values: torch.Tensor, gathered: Gathered | None) -> None:
        seen[reader] = seen.get(reader, 0) + 1

    with _counting(model, calls):
        try:
            with Watch(model, owner, note):
                model(**sample)
        except RUN_ERRORS as error:
            raise ValueError(
                f"{type(model).__name__} cannot run on a sample of the data set, with {', '.join(sample)}: {error}"
            ) from error
    first = list(calls)
    inside: dict[str, int] = {}
    for path in (path for structure in readers for path in _ancestors(structure)):
        inside[path] = inside.get(path, 0) + 1
    order = list(dict.fromkeys(owner[reader] for reader in seen))
    order += [structure for structure in readers if structure not in order]
    stops: dict[nn.Module, list[tuple[Structure, bool]]] = {}
    for structure in order:
        path = _find_path(model, structure, calls, inside)
        once = len(readers[structure]) == 1 and seen.get(readers[structure][0]) == 1
        stops.setdefault(get_module(model, path), []).append((structure, once))
    return [Stop(module, tuple(stops[module])) for module in sorted(stops, key=first.index)]


@contextmanager
def _counting(model: nn.Module, calls: dict[nn.Module, int]) -> Iterator[None]:
    """Count how often each module is called, in the order of their first calls."""

    def count(module: nn.Module, args: Any) -> None:
        calls[module] = calls.get(module, 0) + 1

    handles = [module.register_forward_pre_hook(count) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _find_path(
    model: nn.Module, structure: Structure, calls: Mapping[nn.Module, int], inside: Mapping[str, int]
) -> str:
    """The name of the module to wait at for a structure; that of the model itself is empty."""
    found = None
    for path in _ancestors(structure):
        if calls.get(get_module(model, path)) != 1:
            continue
        if found is not None and (inside[path] > _MOST or not path):
            break
        found = path
    return found or ""


def _ancestors(structure: Structure) -> list[str]:
    """The names of the modules around all members of a structure, the smallest first, the model itself last."""
    parts = [member.tensor.split(".")[:-1] for member in structure.members]
    common: list[str] = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return [".".join(common[:end]) for end in range(len(common), -1, -1)]
