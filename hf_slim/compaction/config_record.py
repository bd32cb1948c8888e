"""The shape record: what a config says of the sizes of a slim model, in the plainest form that says it.

What is smaller is noted on the modules themselves when it is cut or loaded (`modeling_hf_slim.mark_tensor`), so that
whatever becomes of a model, its record can be read off it: other layers, another model around it, merged adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_hf_slim import (
    DENSE_NUMBERS,
    DENSE_SHAPES,
    OUTSIDE,
    RECORD_KEY,
    RECORD_VERSION,
    ConfigView,
    find_base,
    get_number,
    infers_widths,
    is_record,
)
from ..structures import BASE, find_tensor, join

REMOTE_MODULE = "modeling_hf_slim"
EXPRESSED = "_hf_slim_expressed"
"""Attribute of a model whose config expresses its sizes by fields: what these were, and the record they stand for."""


def own_configs(root: nn.Module) -> None:
    """Give the models in a module configs of their own: other models may be built from those that they have.

    Args:
        root: A model, or a module that holds some; changed in place.
    """
    copies: dict[int, Any] = {}
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            copy.deepcopy(module.config, copies)
    for module in root.modules():
        for owner in (module.__dict__, *(v.__dict__ for v in module.__dict__.values() if isinstance(v, ConfigView))):
            for name, value in list(owner.items()):
                if isinstance(value, PreTrainedConfig) and id(value) in copies:
                    owner[name] = copies[id(value)]


def refresh_record(model: PreTrainedModel, *, is_own: bool = False) -> None:
    """Make the record in a model's config say what the model is now.

    Args:
        model: The model; its config is changed in place, if it is its own.
        is_own: Whether its config is no other model's; else the model gets one of its own before it is changed.

    Raises:
        ValueError: If its shape cannot be recorded: it holds another model of its own kind that shares its config, or
            the config has a key of this name that is somebody else's.
    """
    found = _collect(model)
    owners = find_owners(model)
    if all(find_record(owner.config) == found.get(path) for path, owner in owners.items()):
        return
    if not is_own:
        own_configs(model)
    for path, owner in owners.items():
        there = owner.config.__dict__.get(RECORD_KEY)
        if path not in found:
            if is_record(there):
                del owner.config.__dict__[RECORD_KEY]
        elif there is not None and not is_record(there):
            raise ValueError(
                f"The config of {type(owner).__name__} has a key {RECORD_KEY!r} that is no shape record ({there!r}): "
                "rename that key, so that the sizes of the slim model can be written there."
            )
        else:
            setattr(owner.config, RECORD_KEY, found[path])


def find_pretrained(model: nn.Module) -> list[PreTrainedModel]:
    """Find the transformers models in a module, without those inside another.

    Args:
        model: Any module; a transformers model is the only one of its own.

    Returns:
        The models in the order of the modules.
    """
    if isinstance(model, PreTrainedModel):
        return [model]
    return list(dict.fromkeys(part for child in model.children() for part in find_pretrained(child)))


def is_smaller(module: nn.Module) -> bool:
    """Whether something of a module itself has been made smaller than its config says."""
    return DENSE_SHAPES in module.__dict__ or DENSE_NUMBERS in module.__dict__ or infers_widths(module)


def has_record(config: PreTrainedConfig) -> bool:
    """Whether a config, or one inside it, holds a shape record."""
    return any(is_record(part.__dict__.get(RECORD_KEY)) for part in _walk(config))


def find_stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers that a model is of.

    Args:
        model: A transformers model, possibly one that was loaded through the resizing file beside it.

    Returns:
        The class that transformers exports, or the model's own class if it is not one of those.
    """
    own = type(model)
    stock = getattr(transformers, own.__name__, None)
    return stock if stock in own.__mro__ and (stock is own or own.__module__.endswith(REMOTE_MODULE)) else own


def find_auto_classes(config: PreTrainedConfig) -> dict[str, str]:
    """Find the Auto classes that know a config.

    Args:
        config: The config of a model.

    Returns:
        For each Auto class's name the name of the class that it builds.
    """
    found: dict[str, str] = {}
    for auto_name in sorted(name for name in vars(transformers.models.auto.modeling_auto) if name.startswith("Auto")):
        mapping = getattr(getattr(transformers, auto_name, None), "_model_mapping", None)
        if mapping is None or type(config) not in mapping:
            continue
        served = mapping[type(config)]
        names = [kind.__name__ for kind in (served if isinstance(served, (list, tuple)) else (served,))]
        found[auto_name] = next((name for name in config.architectures or () if name in names), names[0])
    return found


def make_auto_map(config: PreTrainedConfig) -> dict[str, str] | None:
    """What `auto_map` a config is to be saved with.

    Args:
        config: The config of a model, slim or not.

    Returns:
        With a record all Auto classes that know the config, and the classes of the resizing file; without one nothing
        of that file. Code of somebody else's is left as it is, None if there is nothing.
    """
    there = config.__dict__.get("auto_map")
    if there and not all(_is_remote(target) for target in there.values()):
        return there
    if not has_record(config):
        return None
    return {auto: f"{REMOTE_MODULE}.{name}" for auto, name in find_auto_classes(config).items()} or None


def has_remote_code(config: PreTrainedConfig) -> bool:
    """Whether the resizing file lies beside a model that is saved with a config."""
    targets = (make_auto_map(config) or {}).values()
    return any(_is_remote(target) for target in targets)


def forget_remote_code(config: PreTrainedConfig) -> None:
    """Let a config that was read not name the resizing file, which is only there where it is written along."""
    there = config.__dict__.get("auto_map")
    if there and all(_is_remote(target) for target in there.values()):
        del config.auto_map


def _is_remote(target: Any) -> bool:
    return isinstance(target, str) and target.rpartition("--")[2].partition(".")[0] == REMOTE_MODULE


def _walk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it, which are saved with it."""
    yield config
    for value in list(config.__dict__.values()):
        if isinstance(value, PreTrainedConfig):
            yield from _walk(value)


def find_record(config: PreTrainedConfig) -> Any:
    """The shape record of a config, None if it has none."""
    record = config.__dict__.get(RECORD_KEY)
    return record if is_record(record) else None


def find_owners(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """By path the models whose configs hold records: the model, and those in it that its config has a config for.

    A config that several models side by side have is left out: what it said would hold for all of them.
    """
    saved = {id(config) for config in _walk(model.config)}
    users: dict[int, dict[str, PreTrainedModel]] = {}
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and id(part.config) in saved:
            others = users.setdefault(id(part.config), {})
            if not any(not other or path.startswith(f"{other}.") for other in others):
                others[path] = part
    return {path: part for parts in users.values() if len(parts) == 1 for path, part in parts.items()}


def _collect(model: PreTrainedModel) -> dict[str, Any]:
    """The records of a model, by the path of the model whose config is to hold each."""
    owners = find_owners(model)
    found = {}
    for path, owner in owners.items():
        record = read_off(model, path, owner, owners)
        if record is not None and not _is_expressed(owner, record):
            found[path] = record
    return found


def read_off(
    model: PreTrainedModel, path: str, owner: PreTrainedModel, owners: Mapping[str, PreTrainedModel]
) -> dict[str, Any] | None:
    """The record of what is smaller in a model, models inside it with records of their own aside; None for nothing."""
    prefix, base = find_base(owner)
    inside = tuple(f"{other}." for other in owners if other != path and is_within(other, path))
    record: dict[str, Any] = {"shapes": {}, "attributes": {}, "infer": []}
    repeated = _find_repeated(owner, base)
    for full, module in owner.named_modules():
        if f"{join(path, full)}.".startswith(inside):
            continue
        name = ".".join(part for part in full.split(".") if part != BASE)
        if prefix:
            in_base = is_within(name, prefix) and repeated is None
            name = name[len(prefix) + 1 :] if in_base else OUTSIDE + name
        for leaf, dense in module.__dict__.get(DENSE_SHAPES, {}).items():
            shape = shape_of(module, leaf)
            if shape not in (None, dense):
                record["shapes"][join(name, leaf)] = list(shape)
        numbers = {key: get_number(module, key) for key in module.__dict__.get(DENSE_NUMBERS, {})}
        numbers = {key: value for key, value in numbers.items() if value != module.__dict__[DENSE_NUMBERS][key]}
        if numbers:
            record["attributes"][name] = numbers
        if infers_widths(module):
            record["infer"].append(name)
    if not any(record.values()):
        return None
    if repeated is not None and not prefix:
        raise ValueError(
            f"The shape of {type(owner).__name__} cannot be recorded: {repeated} in it is of the same class, and what "
            "the config says would hold for both. Slim and save that one by itself."
        )
    names = {"model": type(owner).__name__.removeprefix("FSDP"), "base": type(base).__name__.removeprefix("FSDP")}
    return {"version": RECORD_VERSION, **names, **record}


def is_within(name: str, path: str) -> bool:
    """Whether a dotted name is that of a module or of something in it."""
    return not path or name == path or name.startswith(f"{path}.")


def _find_repeated(model: PreTrainedModel, base: nn.Module) -> str | None:
    """Another model in it whose base model is of the same class, so that the same names lie in both."""
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part is not model and part is not base:
            other = find_base(part)[1]
            if other is not base and type(other) is type(base):
                return path
    return None


def shape_of(module: nn.Module, leaf: str) -> tuple[int, ...] | None:
    """The shape of a parameter or buffer of a module, whole; None if it has none of that name."""
    tensor = find_tensor(module, leaf)
    # DeepSpeed's stage 3 leaves an empty tensor, and keeps the shape beside it.
    return None if tensor is None else tuple(getattr(tensor, "ds_shape", tensor.shape))


def _is_expressed(owner: PreTrainedModel, record: Mapping[str, Any]) -> bool:
    """Whether fields of the config say what a record would."""
    known = owner.__dict__.get(EXPRESSED)
    return known is not None and all(known["record"][key] == record[key] for key in ("shapes", "attributes", "infer"))
