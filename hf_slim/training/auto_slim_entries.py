"""Auto-slim entries: `parse_auto_slim_config` finds the layers, and the callback takes what it returns."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..arguments import SlimConfig, check_settings
from ..structures import Discovery, Kind, Structure, find_structures, require_structures

PATTERNS: dict[str, Kind] = {"channelx1": "ffn", "mha": "mha"}
"""What `pattern` says of the kind of structure."""
_ENTRY_FIELDS = {
    "start_step": "slim_start",
    "end_step": "slim_end",
    "pruning_frequency": "slim_frequency",
    "pruning_scope": "slim_scope",
    "sparsity_decay_type": "slim_schedule",
    "pruning_type": "slim_criterion",
}
_REQUIRED = ("op_names", "pattern", "target_sparsity")
_ENTRY_DEFAULTS = SlimConfig(slim_criterion="snip_momentum", slim_schedule="exp", slim_round_to=1)


def parse_auto_slim_config(
    model: nn.Module, ffn2_sparsity: float = 0.8, mha_sparsity: float = 0.6, **kwargs: Any
) -> list[dict[str, Any]]:
    """Find the layers to slim and describe them, for `SlimTrainerCallback`.

    Args:
        model: The model to be trained.
        ffn2_sparsity: Fraction of the intermediate channels to remove, in [0, 1); 0 leaves them alone.
        mha_sparsity: Fraction of the attention heads to remove, in [0, 1); 0 leaves them alone.
        **kwargs: Passed into every entry: `start_step`, `end_step`, `pruning_frequency`, `pruning_scope` (`global` or
            `local`), `sparsity_decay_type` (`exp`, `cubic` or `cube`, `cos`, `linear`, `oneshot`), `pruning_type`
            (`snip_momentum`, `magnitude`, `taylor`).

    Returns:
        A plain dict for each kind, with `op_names` (the FFN2 layers; the query, key, value and output projections),
        `pattern` (`channelx1` or `mha`), `target_sparsity` and the keywords.

    Raises:
        TypeError: If a keyword is unknown.
        ValueError: If a sparsity or the value of a keyword is out of range, or the model has nothing to slim.
    """
    unknown = sorted(kwargs.keys() - _ENTRY_FIELDS.keys())
    if unknown:
        raise TypeError(
            f"parse_auto_slim_config() got an unexpected keyword argument {unknown[0]!r}; it takes "
            f"{', '.join(_ENTRY_FIELDS)}."
        )
    _to_config(kwargs, ffn2_sparsity=ffn2_sparsity, mha_sparsity=mha_sparsity)
    entries = []
    found = find_structures(model)
    for sparsity, pattern in ((ffn2_sparsity, "channelx1"), (mha_sparsity, "mha")):
        if sparsity:
            structures = require_structures(model, found, PATTERNS[pattern])
            entries.append(
                {"op_names": _op_names(structures), "pattern": pattern, "target_sparsity": sparsity, **kwargs}
            )
    return entries


def read_entry(entry: Any) -> tuple[SlimConfig, float]:
    """The settings that an entry of `parse_auto_slim_config` asks for.

    Args:
        entry: The entry.

    Returns:
        The settings, and the sparsity to reach.

    Raises:
        ValueError: If it is no such entry, lacks something, or a value is out of range.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"An auto-slim entry must be a dict, got {entry!r}: take the entries from parse_auto_slim_config."
        )
    unknown = [key for key in entry if key not in (*_REQUIRED, *_ENTRY_FIELDS)]
    if unknown:
        known = ", ".join(sorted((*_REQUIRED, *_ENTRY_FIELDS)))
        raise ValueError(f"{unknown[0]} is not known in an auto-slim entry; known are {known}.")
    missing = sorted(set(_REQUIRED) - set(entry))
    if missing:
        raise ValueError(f"An auto-slim entry lacks {missing[0]}; take the entries from parse_auto_slim_config.")
    pattern, names, sparsity = (entry[key] for key in ("pattern", "op_names", "target_sparsity"))
    if pattern not in list(PATTERNS):
        raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}.")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"op_names must be a list of the names of layers, got {names!r}.")
    if not names:
        raise ValueError(
            f"op_names of the entry with pattern {pattern!r} is empty: name layers, or leave the entry out."
        )
    sparsities = {"ffn2_sparsity" if PATTERNS[pattern] == "ffn" else "mha_sparsity": sparsity}
    return _to_config({key: entry[key] for key in entry if key in _ENTRY_FIELDS}, **sparsities), sparsity


def find_entry_structures(found: Discovery, entry: Mapping[str, Any]) -> tuple[Structure, ...]:
    """The structures that an entry of `parse_auto_slim_config` describes.

    Args:
        found: What the model has.
        entry: An entry that `read_entry` takes; its `op_names` may have been shortened by the user.

    Returns:
        The structures all of whose layers are named.

    Raises:
        ValueError: If a layer is named that is not a layer of a whole structure.
    """
    pattern, names = entry["pattern"], set(entry["op_names"])
    chosen = tuple(s for s in found.of_kind(PATTERNS[pattern]) if names.issuperset(_op_names([s])))
    unused = names.difference(_op_names(chosen))
    if unused:
        raise ValueError(
            f"op_names: {', '.join(sorted(unused))} cannot be slimmed as {pattern}: not a layer of this model's "
            "structures, or only a part of one is named. Take the names from parse_auto_slim_config."
        )
    return chosen


def _to_config(keywords: Mapping[str, Any], **sparsities: Any) -> SlimConfig:
    """The keywords of an entry as settings; in what is said of a bad value it is called as it is in the entry."""
    config = copy.copy(_ENTRY_DEFAULTS)
    for key, value in keywords.items():
        setattr(config, _ENTRY_FIELDS[key], value)
    if config.slim_schedule == "cube":
        config.slim_schedule = "cubic"
    for name, value in sparsities.items():
        setattr(config, name, value)
    check_settings(config, {field: key for key, field in _ENTRY_FIELDS.items()})
    return config


def _op_names(structures: Iterable[Structure]) -> list[str]:
    """The layers whose weights are scored: FFN2, or query, key, value and output projection."""
    names = (
        member.tensor.removesuffix(".weight")
        for s in structures
        for member in s.members
        if member.role == "output" or (s.kind == "mha" and member.role == "input")
    )
    return list(dict.fromkeys(names))
