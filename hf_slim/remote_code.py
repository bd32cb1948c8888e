"""The self-contained file that gives a slim model its shape where hf_slim is not installed."""

from __future__ import annotations

import pprint
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from .attributes import get_count
from .discovery import find_structures
from .layers import sizes_of
from .loading import REMOTE_MODULE, base_prefix, build_dense, find_stock_class
from .structures import Structure, get_tensor

_WIDTHS = Path(__file__).with_name("widths.py")
_TEMPLATE = Path(__file__).with_name("templates") / "modeling_hf_slim.py.txt"


def make_remote_code(model: PreTrainedModel) -> tuple[str, dict[str, str]] | None:
    """Write the remote-code file of a slim model.

    Args:
        model: The slim model, with a shape record in its config.

    Returns:
        The source text, and the `auto_map` for the config; None if the model's class is not one that transformers
        exports, so that the file could not import it.
    """
    auto_map: dict[str, str] = {}
    classes: list[str] = []
    for auto_class, name in find_auto_classes(model).items():
        auto_map[auto_class] = f"{REMOTE_MODULE}.{name}"
        if name not in classes:
            classes.append(name)
    if not auto_map:
        return None
    dense = build_dense(model)
    prefix = base_prefix(model)
    structures = find_structures(dense).structures
    shapes = {}
    shrunk = set()
    for structure in structures:
        for member in structure.members:
            shape = tuple(get_tensor(model, member.tensor).shape)
            if shape != tuple(get_tensor(dense, member.tensor).shape):
                shapes[member.tensor.removeprefix(prefix)] = shape
                shrunk.add(structure.name)
    reshaping = [name.removeprefix(prefix) for s in structures if s.name in shrunk for name in s.reshaping]
    source = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        shapes=pprint.pformat(shapes, width=110, sort_dicts=False),
        attributes=pprint.pformat(_attributes(model, dense, structures, prefix), width=110, sort_dicts=False),
        reshaping=pprint.pformat(reshaping, width=110),
        widths=_WIDTHS.read_text(encoding="utf-8") + "\n\n" if reshaping else "",
        classes="\n\n\n".join(_class_source(name) for name in classes),
    )
    return source, auto_map


def _class_source(name: str) -> str:
    return (
        f"class {name}(transformers.{name}):\n"
        f'    """`transformers.{name}` with the sizes above."""\n\n'
        "    def __init__(self, config, *args, **kwargs):\n"
        "        super().__init__(config, *args, **kwargs)\n"
        "        resize(self)"
    )


def find_auto_classes(model: PreTrainedModel) -> dict[str, str]:
    """Find the Auto classes that build a model's class or its base model's.

    Args:
        model: A transformers model.

    Returns:
        For each Auto class's name the name of the class that it builds; empty for a class of the user's own.
    """
    own = find_stock_class(model)
    found: dict[str, str] = {}
    for auto_name in sorted(name for name in vars(transformers.models.auto.modeling_auto) if name.startswith("Auto")):
        mapping = getattr(getattr(transformers, auto_name, None), "_model_mapping", None)
        if mapping is None or type(model.config) not in mapping:
            continue
        served = mapping[type(model.config)]
        for candidate in served if isinstance(served, (list, tuple)) else (served,):
            if candidate is own or auto_name == "AutoModel":
                found[auto_name] = candidate.__name__
    return found if own.__name__ in found.values() else {}


def _attributes(
    model: nn.Module, dense: nn.Module, structures: Sequence[Structure], prefix: str
) -> dict[str, dict[str, Any]]:
    """For each module the attributes that differ from the dense model's."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        other = sizes_of(dense.get_submodule(name))
        for attribute, value in sizes_of(module).items():
            if value != other[attribute]:
                found.setdefault(name.removeprefix(prefix), {})[attribute] = value
    for structure in structures:
        for count in structure.counts:
            value = get_count(model, count)
            if value != get_count(dense, count):
                found.setdefault(count.module.removeprefix(prefix), {})[count.attribute] = value
    return found
