"""The shape record in config.json: written, read, and applied to a model that is built."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .attributes import get_count
from .compaction import resize_structures
from .discovery import find_structures
from .layers import join
from .layouts import CONFIG_CHANNELS, CONFIG_HEADS
from .structures import Structure, get_tensor

RECORD_KEY = "slim"
RECORD_VERSION = 1
REMOTE_MODULE = "modeling_hf_slim"
_CHECKING = "_hf_slim_checking"
_GIVEN = "_hf_slim_given"
"""Where a model keeps the names of its structures that have the units of the record."""


def set_shape_record(model: PreTrainedModel) -> None:
    """Write a model's shape into its config, so that `save_pretrained` saves it.

    A shape that the config can express by its own fields is written there, and the model is a stock one. Any other is
    written under the key `slim`: a version, and for each structure its name relative to the base model and its number
    of units.

    Args:
        model: A model, compacted or not; its config is changed in place.

    Raises:
        ValueError: If a model built from the record would have another shape.
    """
    config = model.config
    config.__dict__.pop(RECORD_KEY, None)
    # Those of the dense model: sizes of the slim one may coincide, so that less can be told apart in it.
    dense = build_dense(model)
    structures = find_structures(dense).structures
    if _is_like(dense, model, structures):
        return
    units = {relative_name(model, s): count_left(model, s) for s in structures}
    stock = _express(config, model, structures, units)
    if stock is not None and _can_be_read(stock) and _has_shape_of(model, stock, structures):
        for name in (*CONFIG_CHANNELS, *CONFIG_HEADS):
            if name in stock.__dict__:
                setattr(config, name, getattr(stock, name))
        return
    setattr(config, RECORD_KEY, {"version": RECORD_VERSION, "units": units})
    if not _has_shape_of(model, config, structures, only_structures=True):
        raise ValueError(
            f"The shape of {type(model).__name__} cannot be recorded: a model built from its config and the record "
            "has another one. Two models inside it may share one config. Slim and save each of them by itself."
        )


def apply_shape_record(model: PreTrainedModel) -> None:
    """Give a freshly built model the shape that its config records; nothing if there is no record.

    A hook calls it at the end of `PreTrainedModel.post_init`, so also for the models inside a model, which share its
    config: names that belong to another level are left to that level.

    Args:
        model: A model; changed in place.

    Raises:
        ValueError: If the record is not one of ours, is of a newer version, names modules that do not exist, or asks
            for more units than a structure has.
    """
    record = getattr(model.config, RECORD_KEY, None)
    if record is None:
        return
    units = _read_record(model.config, record)
    # Sizes that a model inside has been given may coincide, so that less can be told apart now.
    given = _find_given(model)
    if given.issuperset(units):
        _forget_remote_code(model)
        return
    by_name = {relative_name(model, s): s for s in find_structures(model).structures}
    matched = {name: s for name, s in by_name.items() if name in units and name not in given}
    _refuse_unknown(model, set(units) - set(by_name) - given, whole=bool(matched or given))
    try:
        resize_structures(
            model,
            [s for name, s in matched.items() if s.units != units[name]],
            {s.name: units[name] for name, s in matched.items()},
        )
    except ValueError as error:
        raise ValueError(f"The shape record in {_where(model.config)} does not fit the model: {error}") from error
    model.__dict__[_GIVEN] = tuple(s.name for s in matched.values())
    _forget_remote_code(model)


def find_damaged_weights(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, str]]:
    """Find the safetensors files of a folder that are cut off or of another format, without reading the weights.

    Args:
        folder: The folder; nothing is found if there is none.

    Yields:
        The files, each with what is wrong with it.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            yield path, str(error)


def relative_name(model: nn.Module, structure: Structure) -> str:
    """A structure's name relative to the base model.

    Args:
        model: The model that the structure was found in.
        structure: One of its structures.

    Returns:
        The name without the prefix of the base model, where it lies inside it.
    """
    return structure.name.removeprefix(base_prefix(model))


def base_prefix(model: nn.Module) -> str:
    """What the names inside the base model begin with: `bert.`, say, or nothing in a base model itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and getattr(model, prefix, None) is not None else ""


def build_dense(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config without the shape record, on the meta device.

    Args:
        model: The model.

    Returns:
        The model as its config alone describes it, without weights.
    """
    config = copy.deepcopy(model.config)
    config.__dict__.pop(RECORD_KEY, None)
    return _build(model, config)


def find_stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers that a model is of.

    Args:
        model: A transformers model, possibly one that was loaded through a remote-code file of ours.

    Returns:
        The class that transformers exports, or the model's own class if it is not one of those.
    """
    own = type(model)
    stock = getattr(transformers, own.__name__, None)
    return stock if stock in own.__mro__ and (stock is own or own.__module__.endswith(REMOTE_MODULE)) else own


def count_left(model: PreTrainedModel, structure: Structure) -> int:
    """How many units of one of the dense model's structures a slim model has.

    Args:
        model: The slim model.
        structure: A structure of the dense one.

    Returns:
        The number of units.
    """
    output = structure.outputs[0]
    return get_tensor(model, output.tensor).shape[output.dim] // output.index.shape[1]


def _where(config: PreTrainedConfig) -> str:
    return f"config.json of {config.name_or_path!r}" if config.name_or_path else "the config"


def _read_record(config: PreTrainedConfig, record: Any) -> dict[str, int]:
    where = _where(config)
    version = record.get("version") if isinstance(record, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"The key {RECORD_KEY!r} in {where} is not a shape record of hf_slim: {record!r}.")
    if version > RECORD_VERSION:
        raise ValueError(
            f"The shape record in {where} is of version {version}, but this hf_slim reads up to "
            f"{RECORD_VERSION}: upgrade it with `pip install --upgrade hf-slim`."
        )
    units = record.get("units")
    if not isinstance(units, dict):
        raise ValueError(f"The shape record in {where} has no table of units: {record!r}.")
    for name, number in units.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"The shape record in {where} gives {name} {number!r} units, not a whole number from 1.")
    return units


def _refuse_unknown(model: PreTrainedModel, unknown: set[str], *, whole: bool) -> None:
    """Refuse names that ought to exist in this model.

    In a model of the class that was saved all must exist. Another class may be a part (an encoder, a base model), or
    lie inside the model: there a name may be missing if the class that was saved has it.
    """
    if type(model).__name__ in (model.config.architectures or ()):
        missing = unknown
    elif whole:
        base = model.base_model
        missing = {name for name in unknown if name.partition(".")[0] in dict(base.named_children())}
        if unknown - missing and not hasattr(model.config, _CHECKING):
            _build_saved_class(model.config)
    else:
        return
    if missing:
        raise ValueError(
            f"The shape record in {_where(model.config)} names modules that {type(model).__name__} does not have: "
            f"{', '.join(sorted(missing))}. The config belongs to another model, or was edited."
        )


def _build_saved_class(config: PreTrainedConfig) -> None:
    """Build the class that was saved, which refuses names that not even it has."""
    config = copy.deepcopy(config)
    setattr(config, _CHECKING, True)
    for name in config.architectures or ():
        saved = getattr(transformers, name, None)
        if saved is not None:
            with torch.device("meta"), no_init_weights():
                saved(config)


def _find_given(model: PreTrainedModel) -> set[str]:
    """The names, relative to the base model, of the structures that models inside it have been given."""
    paths = {join(path, name) for path, module in model.named_modules() for name in module.__dict__.get(_GIVEN, ())}
    return {path.removeprefix(base_prefix(model)) for path in paths}


def _forget_remote_code(model: PreTrainedModel) -> None:
    """Drop the pointer to the remote-code file, which is not there when this model is saved again."""
    auto_map = getattr(model.config, "auto_map", None)
    if auto_map and type(model).__module__.startswith("transformers.models."):
        if all(REMOTE_MODULE in str(target) for target in auto_map.values()):
            del model.config.auto_map


def _express(
    config: PreTrainedConfig, model: PreTrainedModel, structures: tuple[Structure, ...], units: Mapping[str, int]
) -> PreTrainedConfig | None:
    """A config whose own fields say the sizes, if each field's structures are uniform; not yet checked."""
    stock = copy.deepcopy(config)
    for fields, kind in ((CONFIG_CHANNELS, "ffn"), (CONFIG_HEADS, "mha")):
        for field in fields:
            value = config.__dict__.get(field)
            if not isinstance(value, int):
                continue
            ratios = {(units[relative_name(model, s)], s.units) for s in _governed(field, kind, model, structures)}
            if not ratios:
                continue
            if len(ratios) > 1:
                return None
            ((now, before),) = ratios
            if value * now % before:
                return None
            setattr(stock, field, value * now // before)
    if "n_inner" in config.__dict__ and config.n_inner is None:
        widths = {units[relative_name(model, s)] for s in structures if s.kind == "ffn"}
        if len(widths) != 1:
            return None
        stock.n_inner = widths.pop()
    return stock


def _can_be_read(config: PreTrainedConfig) -> bool:
    """Whether the class of a config takes its fields again: some ask that the heads divide the hidden size."""
    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, StrictDataclassError):
        return False
    return True


def _governed(field: str, kind: str, model: PreTrainedModel, structures: tuple[Structure, ...]) -> list[Structure]:
    side = field.partition("_")[0] if field.startswith(("encoder_", "decoder_")) else None
    return [
        s for s in structures if s.kind == kind and (side is None or relative_name(model, s).startswith(f"{side}."))
    ]


def _build(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        return find_stock_class(model)(copy.deepcopy(config))


def _has_shape_of(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    structures: tuple[Structure, ...],
    *,
    only_structures: bool = False,
) -> bool:
    """Whether the config builds a model that is like another."""
    try:
        built = _build(model, config)
    except (ValueError, RuntimeError):
        return False
    return _is_like(built, model, structures, only_structures=only_structures)


def _is_like(
    built: PreTrainedModel,
    model: PreTrainedModel,
    structures: tuple[Structure, ...],
    *,
    only_structures: bool = False,
) -> bool:
    """Whether two models have the same tensors and counting attributes (and maybe a head more)."""
    shapes, wanted = _shapes(built), _shapes(model)
    names = {m.tensor for s in structures for m in s.members} if only_structures else wanted.keys()
    if any(shapes.get(name) != wanted[name] for name in names):
        return False
    counts = [(get_count(built, count), get_count(model, count)) for s in structures for count in s.counts]
    return all(actual == wanted or actual is None or wanted is None for actual, wanted in counts)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: tensor.shape for name, tensor in (*parameters, *model.named_buffers())}
