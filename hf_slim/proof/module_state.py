"""Classes, attributes and configs of a model's modules, noted so that they can be put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..modeling_hf_slim import ConfigView

_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Where a module keeps its tensors, its children and its hooks."""


class Snapshot:
    """What the modules of a model are, but for the values of their tensors.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        self._classes = {module: type(module) for module in model.modules()}
        self._tables: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._configs: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
        for module in self._classes:
            for table in (vars(module), *(vars(module)[name] for name in _TABLES if name in vars(module))):
                self._tables[id(table)] = (table, dict(table))
            for value in vars(module).values():
                self._note_config(value)

    def put_back(self) -> None:
        """Give the modules what they had: the same tensors and objects under the same names."""
        for module, kind in self._classes.items():
            if type(module) is not kind:
                module.__class__ = kind
        for table, before in self._tables.values():
            _put_back(table, before)
        for config, before, contents in self._configs.values():
            for name, content in contents.items():
                if before[name] != content:
                    before[name] = copy.deepcopy(content)
            _put_back(config.__dict__, before)

    def _note_config(self, config: Any) -> None:
        if not isinstance(config, (PreTrainedConfig, ConfigView)) or id(config) in self._configs:
            return
        before = dict(config.__dict__)
        contents = {name: copy.deepcopy(v) for name, v in before.items() if type(v) in (dict, list)}
        self._configs[id(config)] = (config, before, contents)
        for value in before.values():
            self._note_config(value)


@contextmanager
def leaving(model: nn.Module) -> Iterator[None]:
    """Leave a model as it is, whatever its forward pass does to it: caches, counters, and values of buffers.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    snapshot = Snapshot(model)
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        snapshot.put_back()
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _put_back(table: dict[str, Any], before: dict[str, Any]) -> None:
    if table.keys() != before.keys() or any(table[name] is not value for name, value in before.items()):
        table.clear()
        table.update(before)
