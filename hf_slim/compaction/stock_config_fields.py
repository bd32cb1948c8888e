"""Sizes of a slim model that the fields of its config can say, so that it is a stock model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_hf_slim import DENSE_NUMBERS, DENSE_SHAPES, RECORD_KEY, get_number, infers_widths
from ..structures import CONFIG_CHANNELS, CONFIG_HEADS, Structure, get_module
from .config_record import (
    EXPRESSED,
    find_owners,
    find_pretrained,
    find_record,
    find_stock_class,
    has_record,
    is_smaller,
    is_within,
    own_configs,
    read_off,
    refresh_record,
    shape_of,
)

_BUILD_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError, StrictDataclassError)
"""What a class raises that cannot be built from a config."""


def record_shapes(root: nn.Module, structures: Sequence[Structure]) -> None:
    """Write the shapes of the transformers models in a module into their configs, in the plainest form that says them.

    Args:
        root: A model, or a module that holds some; each gets a config of its own, if it is slim.
        structures: Its structures as they are now.

    Raises:
        ValueError: If a shape cannot be recorded.
    """
    parts = find_pretrained(root)
    if not any(is_smaller(module) for part in parts for module in part.modules()):
        return
    own_configs(root)
    for part in parts:
        path = next(path for path, module in root.named_modules() if module is part)
        _write_record(part, _inside({s.name: s for s in structures}, path))


def _write_record(model: PreTrainedModel, structures: Mapping[str, Structure]) -> None:
    """Try the fields of the config, `per_layer_config` and the record, in this order.

    Which of them the class builds from is found by building it, on the meta device.
    """
    refresh_record(model, is_own=True)
    if not has_record(model.config) or any(infers_widths(module) for module in model.modules()):
        return
    owners = {path: owner for path, owner in find_owners(model).items() if find_record(owner.config) is not None}
    for express in (_values, _express_by_layer):
        found = [(owner, express(owner, _inside(structures, path))) for path, owner in owners.items()]
        changes = [(owner, fields) for owner, fields in found if fields is not None]
        if changes and _builds(model, changes):
            for owner, fields in changes:
                _express(owner, fields)
            return


def _express(owner: PreTrainedModel, changes: Mapping[str, Any]) -> None:
    """Let fields of a config say the sizes, and note for every model that has it what they stand for."""
    config = owner.config
    before = {**{name: config.__dict__.get(name) for name in changes}, **_fields_before(owner)}
    for part in owner.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            record = read_off(part, "", part, find_owners(part))
            if record is not None:
                part.__dict__[EXPRESSED] = {"fields": before, "record": record}
    _set_fields(config, changes)


def _set_fields(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    """Let fields say what the record said."""
    del config.__dict__[RECORD_KEY]
    for name, value in changes.items():
        setattr(config, name, value)


def _fields_before(owner: PreTrainedModel) -> dict[str, Any]:
    """The fields that were changed to express its sizes, with the values that they had for all units."""
    return owner.__dict__.get(EXPRESSED, {"fields": {}})["fields"]


def _inside(structures: Mapping[str, Structure], path: str) -> dict[str, Structure]:
    """The structures of a model inside another, by their names in it."""
    return {name[len(path) + 1 :] if path else name: s for name, s in structures.items() if is_within(name, path)}


def _express_by_layer(owner: PreTrainedModel, structures: Mapping[str, Structure]) -> dict[str, Any] | None:
    """Overrides by layer of a config that say the sizes; not yet checked."""
    if not hasattr(type(owner.config), "per_layer_config"):  # before transformers 5.14
        return None
    there = {int(layer): fields for layer, fields in owner.config.to_dict().get("per_layer_config", {}).items()}
    layers: dict[int, dict[str, Structure]] = {}
    for name, structure in structures.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is None:
            return None
        layers.setdefault(number, {})[name] = structure
    overrides = dict(there)
    for number, found in sorted(layers.items()):
        values = _values(owner, found, there.get(number, {}))
        if values is None:
            return None
        overrides[number] = {**there.get(number, {}), **values}
    return {"per_layer_config": overrides}


def _values(
    owner: PreTrainedModel, structures: Mapping[str, Structure], layer: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What fields would have to say for some structures, not yet checked; None if they differ, or none can say it."""
    there = {**owner.config.__dict__, **_fields_before(owner), **(layer or {})}
    changes: dict[str, Any] = {}
    for fields, kind in ((CONFIG_CHANNELS, "ffn"), (CONFIG_HEADS, "mha")):
        for field in fields:
            value = there.get(field)
            side = field.partition("_")[0] if field.startswith(("encoder_", "decoder_")) else None
            shares = {
                Fraction(structure.units, _units_before(owner, name, structure))
                for name, structure in structures.items()
                if structure.kind == kind and (side is None or f".{name}".partition(f".{side}.")[1])
            }
            if not isinstance(value, int) or not shares - {1}:
                continue
            left = value * min(shares)
            if len(shares) > 1 or left.denominator > 1:
                return None
            changes[field] = int(left)
    if "n_inner" in there and there["n_inner"] is None:
        widths = {structure.units for structure in structures.values() if structure.kind == "ffn"}
        if len(widths) != 1:
            return None
        changes["n_inner"] = widths.pop()
    return changes


def _units_before(owner: PreTrainedModel, name: str, structure: Structure) -> int:
    """How many units a structure has by its model's config."""
    output = structure.outputs[0]
    path = output.tensor[len(structure.name) - len(name) :]  # relative to the owner, as the name is
    module, leaf = get_module(owner, path.rpartition(".")[0]), path.rpartition(".")[2]
    shape = module.__dict__.get(DENSE_SHAPES, {}).get(leaf, shape_of(module, leaf))
    return shape[output.dim] // output.index.shape[1]


def _builds(model: PreTrainedModel, changes: Sequence[tuple[PreTrainedModel, Mapping[str, Any]]]) -> bool:
    """Whether its class builds a model's shapes and numbers from its config with other fields, as read from a file."""
    stock: Any = find_stock_class(model)
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    try:
        for owner, fields in changes:
            _set_fields(copies[id(owner.config)], fields)
        with torch.device("meta"):
            built = stock(type(config).from_dict(config.to_dict()))
        modules = dict(built.named_modules())
        return all(_is_like(modules.get(path), module) for path, module in model.named_modules())
    except _BUILD_ERRORS:
        return False


def _is_like(built: nn.Module | None, module: nn.Module) -> bool:
    """Whether a module has the shapes and numbers of another (and maybe a child more)."""
    leaves = (*module._parameters, *module._buffers)
    if built is None or any(shape_of(module, leaf) != shape_of(built, leaf) for leaf in leaves):
        return False
    numbers = module.__dict__.get(DENSE_NUMBERS, {})
    return all(get_number(built, name) in (None, get_number(module, name)) for name in numbers)
