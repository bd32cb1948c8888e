"""Any model type of transformers as a tiny random model: its default config, shrunk by general rules."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny_rules import (
    CHANNELS,
    DEPTHS,
    HEAD_DIM,
    HIDDEN,
    LAYER_COUNTS,
    LAYER_LISTS,
    LAYERS,
    MAIN_COUNTS,
    NOT_LAYERS,
    OVERRIDES,
    RULES,
    STAGES,
    STATE_HEADS,
    UNSET,
    VOCAB,
)
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.auto import modeling_auto


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a type, shrunk.

    Args:
        model_type: As in `config.json`.

    Returns:
        A config of the same class.
    """
    config = CONFIG_MAPPING[model_type]()
    _shrink(config, _Scale(_small_ids(config), _channel_factor(config)))
    for path, value in OVERRIDES.get(model_type, {}).items():
        *parents, name = path.split(".")
        owner = vars(config)
        for parent in parents:
            owner = owner[parent] if isinstance(owner[parent], dict) else vars(owner[parent])
        owner[name] = value
    return type(config).from_dict(config.to_dict())


def model_types() -> list[str]:
    """All types that an Auto class serves."""
    return sorted(set().union(*_auto_classes().values()))


def serves(auto_class: str, model_type: str) -> bool:
    """Whether an Auto class serves a type."""
    return model_type in _auto_classes()[auto_class]


def auto_class_of(model_type: str) -> str:
    """The first Auto class that serves a type, `AutoModel` where it does."""
    return next(name for name, types in _auto_classes().items() if model_type in types)


def build_tiny(model_type: str, auto_class: str = "AutoModel") -> PreTrainedModel:
    """A tiny model with random weights such that every unit matters.

    Args:
        model_type: As in `config.json`.
        auto_class: The class to build it with.

    Returns:
        The model, float32, in evaluation mode, the same every time.
    """
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32).float()
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Fill all parameters so that no part is dead: matrices keep the scale of their inputs, vectors get noise."""
    torch.manual_seed(seed)
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if tensor.dim() < 2:
                tensor.nan_to_num_().add_(torch.randn_like(tensor), alpha=0.2)
            else:
                fan_in = tensor[0].numel() if isinstance(module, nn.modules.conv._ConvNd) else tensor.shape[-1]
                tensor.normal_(0, 1.4 / fan_in**0.5)


@functools.cache
def _auto_classes() -> dict[str, Any]:
    """Every Auto class with its mapping from types to classes, `AutoModel` first."""
    names = sorted(name for name in vars(modeling_auto) if name.startswith("AutoModel"))
    found = {name: getattr(getattr(modeling_auto, name), "_model_mapping", None) for name in names}
    return {name: mapping._model_mapping for name, mapping in found.items() if mapping is not None}


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _is_token(name: str, value: Any) -> bool:
    return type(value) is int and bool(re.fullmatch(r".*_(token_id|token_index)s?", name))


def _small_ids(config: PreTrainedConfig) -> dict[int, int]:
    """Token ids in the small vocabulary, different ones for different ones."""
    found = set()
    for part in _configs(config):
        for name, value in vars(part).items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if _is_token(name, number):
                    found.add(number)
    taken = {number for number in found if number < VOCAB // 2}
    free = (number for number in range(VOCAB - 1, 0, -1) if number not in taken)
    return {number: number if number in taken else next(free) for number in sorted(found, reverse=True)}


class _Scale(NamedTuple):
    """What must be the same all over a config: the new token ids, and what channels of stages are divided by."""

    ids: dict[int, int]
    factor: int


def _is_channels(name: str, value: Any) -> bool:
    """Whether it gives the widths of stages that differ."""
    return (
        isinstance(value, (list, tuple))
        and all(type(v) is int for v in value)
        and len(set(value)) > 1
        and bool(CHANNELS.fullmatch(name))
    )


def _channels(config: PreTrainedConfig) -> set[int]:
    return {v for name, value in vars(config).items() if _is_channels(name, value) for v in value if v >= 8}


def _channel_factor(config: PreTrainedConfig) -> int:
    """The largest power of two that leaves all channels of stages multiples of eight."""
    channels = set().union(*(_channels(part) for part in _configs(config)))
    factor = 1
    while channels and all(v % (16 * factor) == 0 for v in channels):
        factor *= 2
    return factor


def _shrink(config: PreTrainedConfig, scale: _Scale) -> None:
    done = _shorten(config, scale)
    fields = vars(config)
    channels = _channels(config)
    latent = fields.get("head_dim") == fields.get("qk_rope_head_dim")
    for name, value in list(fields.items()):
        if name.startswith("_") or name in done:
            continue
        if isinstance(value, PreTrainedConfig):
            if value.model_type == "timm_backbone":
                fields[name] = _tiny_resnet(value)
            else:
                _shrink(value, scale)
        elif type(value) is int and value in channels and name in ("hidden_size", "embed_dim"):
            fields[name] = value // scale.factor
        elif name == "embed_dim" and type(value) is int and "depths" in fields:
            fields[name] = _first_width(value, fields.get("num_heads"), scale.factor)
        else:
            fields[name] = UNSET.get(name) if value is None else _shrink_value(name, value, scale)
    rotary = fields.get("rope_parameters") or {}
    if "rope_type" in rotary and "mrope_section" in _modeling_code(type(config)):
        half = int(HEAD_DIM * rotary.get("partial_rotary_factor", 1)) // 2
        rotary.setdefault("mrope_section", [(half + 1) // 3, (half + 1) // 3, half - 2 * ((half + 1) // 3)])
    if "downsampling_ratios" in fields and "encoder_hidden_size" in fields:  # doubled at every ratio
        fields["encoder_hidden_size"], fields["decoder_hidden_size"] = 4, 64
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention has a key for every head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if "qk_rope_head_dim" in fields and latent:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    for expand, heads in STATE_HEADS:
        if expand in fields and heads in fields:  # state-space heads share out the expanded width
            fields[heads] = fields[expand] * HIDDEN // HEAD_DIM


def _first_width(width: int, heads: Any, factor: int) -> int:
    """The width of the first of several stages, each of which doubles it."""
    if factor > 1 and width % factor == 0:
        return width // factor
    return HEAD_DIM // 2 * (heads[0] if isinstance(heads, (list, tuple)) else 2)


def _shrink_value(name: str, value: Any, scale: _Scale) -> Any:
    if isinstance(value, dict):
        return {key: _shrink_value(key, v, scale) if isinstance(key, str) else v for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return type(value)(_shrink_list(name, value, scale))
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _is_token(name, value):
        return scale.ids[value]
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(value)
    return value


def _shrink_list(name: str, values: Any, scale: _Scale) -> list[int]:
    if _is_token(name, values[0]):
        return [scale.ids[v] for v in values]
    if name == "mrope_section":
        return [HEAD_DIM // 2 - (len(values) - 1), *[1] * (len(values) - 1)]
    if re.fullmatch(DEPTHS, name):
        return [min(v, LAYERS) for v in values]
    if re.fullmatch(r"(.*_)?(image|img|crop|patch|tubelet)_size", name):
        return [_shrink_value(name, v, scale) for v in values]
    if CHANNELS.fullmatch(name) and len(set(values)) == 1:
        return [min(v, HIDDEN) for v in values]
    if _is_channels(name, values):
        return [v // scale.factor if v >= 8 else v for v in values]
    return list(values)


def _shorten(config: PreTrainedConfig, scale: _Scale) -> set[str]:
    """Keep a layer of each kind, at least two, in everything that counts or lists layers; returns the fields done."""
    fields = vars(config)
    counts = {name: value for name, value in fields.items() if _counts_layers(name, value)}
    stages = next((len(fields[name]) for name in STAGES if isinstance(fields.get(name), (list, tuple))), None)
    kinds = [value for value in fields.values() if _is_kinds(value) and len(value) in counts.values()]
    total = len(kinds[0]) if kinds else next((counts[name] for name in MAIN_COUNTS if name in counts), 0)
    kept = {value.index(kind) for value in kinds if len(value) == total for kind in value}
    outputs = fields.get("_out_indices") or ()
    if len(fields.get("stage_names") or ()) == total + 1:
        kept |= {index - 1 for index in outputs if index > 0}
    kept |= {i for i in range(total) if len(kept) < LAYERS and i < LAYERS}
    keep = sorted(kept)
    done = set()
    for name, value in counts.items():
        if value != stages:
            fields[name] = len(keep) if value == total else min(value, LAYERS)
        done.add(name)
    if total <= len(keep) or total == stages:
        return done
    if len(fields.get("stage_names") or ()) == total + 1:
        fields["_out_indices"] = [i if i <= 0 else keep.index(i - 1) + 1 for i in outputs]
        fields["_out_features"] = [f"stage{i}" for i in fields["_out_indices"]] if fields["_out_features"] else None
    overrides = getattr(fields.get("_heterogeneity_spec"), "per_layer_overrides", None)
    if overrides:
        small = {keep.index(i): _shrink_value("", values, scale) for i, values in overrides.items() if i in kept}
        for values in small.values():
            if "kv_lora_rank" in fields and "num_attention_heads" in values:
                values["num_key_value_heads"] = values["num_attention_heads"]
                values["head_dim"] = HEAD_DIM + HEAD_DIM // 2
        overrides.clear()
        overrides.update(small)
    for name, value in list(fields.items()):
        if name.startswith("_") or not isinstance(value, (list, tuple)):
            continue
        if len(value) == total:
            numbers = {i: _shrink_value(name, value[i], scale) for i in keep}
            fields[name] = type(value)(numbers.values())
        elif re.fullmatch(LAYER_LISTS, name) and all(isinstance(v, int) for v in value):
            places = dict.fromkeys(max(v, -len(keep)) if v < 0 else v * len(keep) // total for v in value)
            fields[name] = type(value)(places)
        else:
            continue
        done.add(name)
    return done


def _counts_layers(name: str, value: Any) -> bool:
    return type(value) is int and bool(LAYER_COUNTS.fullmatch(name)) and not re.fullmatch(NOT_LAYERS, name)


def _is_kinds(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)


@functools.cache
def _modeling_code(config_class: type) -> str:
    """The source of the model, for what only its defaults say: by them it divides the rotary angles among axes."""
    path = Path(inspect.getfile(config_class))
    path = path.with_name(path.name.replace("configuration", "modeling"))
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _tiny_resnet(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same number of feature maps from a small backbone that transformers has itself."""
    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[i if i < 0 else min(i, 4) for i in config.out_indices],
    )
