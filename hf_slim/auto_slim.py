"""The two-call interface: parse_auto_slim_config finds the layers, model_slim compacts a sparse model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .adapters import REMEDY, has_adapters
from .compaction import compact_model, round_masks
from .containers import find_pretrained
from .discovery import find_structures, require_structures
from .loading import set_shape_record
from .masking import find_zero_units
from .structures import Discovery, Kind, Structure

PATTERNS: dict[str, Kind] = {"channelx1": "ffn", "mha": "mha"}
"""What `pattern` says of the kind of structure."""


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
        ValueError: If a sparsity is out of range, or the model has nothing to slim.
    """
    entries = []
    found = find_structures(model)
    for name, sparsity, pattern in (
        ("ffn2_sparsity", ffn2_sparsity, "channelx1"),
        ("mha_sparsity", mha_sparsity, "mha"),
    ):
        if not 0 <= sparsity < 1:
            raise ValueError(f"{name} must be in [0, 1), got {sparsity}: it is the fraction to remove.")
        if sparsity:
            structures = require_structures(model, found, PATTERNS[pattern])
            entries.append(
                {"op_names": _op_names(structures), "pattern": pattern, "target_sparsity": sparsity, **kwargs}
            )
    return entries


def find_entry_structures(found: Discovery, entry: Mapping[str, Any]) -> tuple[Structure, ...]:
    """The structures that an entry of `parse_auto_slim_config` describes.

    Args:
        found: What the model has.
        entry: The entry, with a known `pattern`; its `op_names` may have been shortened by the user.

    Returns:
        The structures all of whose layers are named.

    Raises:
        ValueError: If no layer is named, or one that is not a layer of a whole structure.
    """
    pattern, names = entry["pattern"], set(entry["op_names"])
    if not names:
        raise ValueError(
            f"op_names of the entry with pattern {pattern!r} is empty: name layers, or leave the entry out."
        )
    chosen = tuple(s for s in found.of_kind(PATTERNS[pattern]) if names.issuperset(_op_names([s])))
    unused = names.difference(_op_names(chosen))
    if unused:
        raise ValueError(
            f"op_names: {', '.join(sorted(unused))} cannot be slimmed as {pattern}: not a layer of this model's "
            "structures, or only a part of one is named. Take the names from parse_auto_slim_config."
        )
    return chosen


def model_slim(model: nn.Module, round_multiplier: int = 32) -> nn.Module:
    """Compact a model whose units are already zero, whoever zeroed them.

    An intermediate channel goes if its FFN2 column is all zero, a head if its output-projection columns are. Needs no
    masks and no data. With rounding, the zero units that remain are kept as they are.

    Args:
        model: The sparse model, or a module that holds such; changed in place, the config of every transformers model
            too, so that `save_pretrained` saves the new shape.
        round_multiplier: The number of channels kept in a layer is rounded up to a multiple of this.

    Returns:
        The same model.

    Raises:
        ValueError: If the multiplier is below 1, the model has adapters, or it has nothing to slim.
    """
    if round_multiplier < 1:
        raise ValueError(f"round_multiplier must be a whole number from 1, got {round_multiplier}.")
    if has_adapters(model):
        raise ValueError(f"{type(model).__name__} has adapters, so it cannot be made smaller. {REMEDY}")
    structures = require_structures(model, find_structures(model))
    masks = round_masks(structures, find_zero_units(model, structures), round_multiplier)
    compact_model(model, structures, masks)
    for part in find_pretrained(model):
        set_shape_record(part)
    return model


def _op_names(structures: Iterable[Structure]) -> list[str]:
    """The layers whose weights are scored: FFN2, or query, key, value and output projection."""
    names = (
        member.tensor.removesuffix(".weight")
        for s in structures
        for member in s.members
        if member.role == "output" or (s.kind == "mha" and member.role == "input")
    )
    return list(dict.fromkeys(names))
