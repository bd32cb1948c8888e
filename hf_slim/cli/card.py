"""`hf-slim card`: the model card of a slim model, written anew from its folder."""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..compaction import has_remote_code
from ..modeling_hf_slim import RECORD_KEY, is_record
from ..saving import SlimReport, StructureSize, count_bytes, count_parameters, write_model_card
from ..structures import find_structures
from .model_folder import check_slim_folder, load_card, load_model


def card(folder: str) -> str:
    """Write the model card of a slim model, in place of one that hf_slim wrote; what somebody else wrote stays.

    Args:
        folder: The folder.

    Returns:
        Where the card lies.

    Raises:
        ValueError: If the folder holds no slim model, or does not say what the model was before.
    """
    path = check_slim_folder(folder)
    model = load_model(folder)
    _write(model, _look_back(model, _find_dense(model.config, path)), path)
    return f"The model card lies in {path / 'README.md'}"


def _write(model: PreTrainedModel, report: SlimReport, folder: Path) -> None:
    there = folder / "README.md"
    with tempfile.TemporaryDirectory(prefix=".card-", dir=folder) as apart:
        write_model_card(
            model, report, Path(apart), _find_name(there), has_remote_code(model.config), _find_metrics(folder), there
        )
        os.replace(Path(apart) / "README.md", there)


def _look_back(model: PreTrainedModel, config: PreTrainedConfig) -> SlimReport:
    """What slimming made of a model, by the config that it had before."""
    with torch.device("meta"):
        dense = type(model)(config).to(model.dtype)
    left = {s.name: s.units for s in find_structures(model).structures}
    sizes = [
        StructureSize(s.name, s.kind, s.units, left[s.name])
        for s in find_structures(dense).structures
        if s.name in left
    ]
    counts = count_parameters(dense), count_parameters(model), count_bytes(dense), count_bytes(model)
    return SlimReport(*counts, tuple(sizes))


def _find_dense(config: PreTrainedConfig, folder: Path) -> PreTrainedConfig:
    """The config of the model before it was slimmed: without what was added, or that of the base model."""
    fields = config.to_dict()
    stripped = _strip(fields)
    if stripped != fields:
        return type(config).from_dict(stripped)
    card = load_card(folder)
    base = card.data.get("base_model") if card is not None else None
    if not isinstance(base, str):
        raise ValueError(
            f"{folder} does not say what the model was before it was slimmed: its config is a stock one. Name the "
            "model under base_model in the metadata of its README.md, or save it again with save_slimmed."
        )
    dense = copy.deepcopy(AutoConfig.from_pretrained(base))
    for name in ("id2label", "label2id", "vocab_size"):
        if hasattr(config, name):
            setattr(dense, name, getattr(config, name))
    return dense


def _strip(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config without shape records and fields by layer."""
    kept = {name: _strip(value) if isinstance(value, dict) else value for name, value in fields.items()}
    return {k: v for k, v in kept.items() if k != "per_layer_config" and not (k == RECORD_KEY and is_record(v))}


def _find_name(card: Path) -> str:
    """What the card that is there calls the model, or else the name of the folder."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    named = re.search(r'\.from_pretrained\("([^"]+)"\)', text)
    return named[1] if named else card.parent.resolve().name


def _find_metrics(folder: Path) -> dict[str, float]:
    """The evaluation in the metadata of the card that is there."""
    card = load_card(folder)
    results = card.data.get("eval_results") or () if card is not None else ()
    return {f"eval_{result.metric_type}": float(result.metric_value) for result in results}
