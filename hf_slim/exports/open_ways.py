"""Which exporters, servers and quantizers take a slim model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..compaction import Form
from ..structures import Structure
from .gguf_file import check_computation

_MULTIPLE = 64
_KNOWN = "where the architecture is known there"
_STOCK = "only a stock result, as slim_scope=local can give"


@dataclass(frozen=True)
class WayOut:
    """Whether something takes a model.

    Args:
        name: What takes it.
        is_open: Whether it does.
        note: What it needs, or why it does not take it.
    """

    name: str
    is_open: bool
    note: str = ""


def find_ways_out(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> tuple[WayOut, ...]:
    """Find what takes a model as it would be saved.

    Args:
        model: The slim model; it needs no values.
        structures: Its structures.
        form: In what form its sizes are saved.

    Returns:
        The ways; those that are for language models only of such.
    """
    ways = (find(model, structures, form) for find in _WAYS)
    return tuple(way for way in ways if way is not None)


def _load(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut:
    notes = {
        "stock": "",
        "per_layer_config": "transformers 5.14 or later",
        "record": "after import hf_slim, or trust_remote_code=True",
    }
    return WayOut("from_pretrained", True, notes[form])


def _export(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut:
    return WayOut("ONNX, OpenVINO, ExecuTorch, torch.export, torch.compile", True)


def _serve(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut | None:
    if not model.can_generate():
        return None
    note = _KNOWN if form == "stock" else f"they build layers by plain fields: {_STOCK}"
    return WayOut("vLLM, TGI", form == "stock", note)


def _convert(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut | None:
    if not model.can_generate():
        return None
    note = _KNOWN if form == "stock" else f"it writes one size for all layers: {_STOCK}"
    return WayOut("llama.cpp (GGUF), by its own converter", form == "stock", note)


def _write_gguf(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut | None:
    if not model.can_generate():
        return None
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__]
    try:
        check_computation(config)
    except ValueError as error:
        return WayOut("llama.cpp (GGUF), by hf-slim export gguf", False, str(error).partition(":")[0])
    return WayOut("llama.cpp (GGUF), by hf-slim export gguf", True, "with a byte-level BPE tokenizer, or none")


def _batch(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut | None:
    if not model.can_generate():
        return None
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    is_open = form == "stock" or {s.units for s in structures if s.kind == "mha"} <= {heads}
    note = "" if is_open else f"its cache has as many heads as the config says: {_STOCK}"
    return WayOut("generate_batch (continuous batching)", is_open, note)


def _quantize(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut:
    return WayOut("int8 (bitsandbytes, torchao)", True)


def _quantize_to_four_bits(model: PreTrainedModel, structures: Sequence[Structure], form: Form) -> WayOut | None:
    widths = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not widths:
        return None
    wrong = next((name for name, width in widths.items() if width % _MULTIPLE), None)
    if wrong is None:
        return WayOut("4-bit on a CPU (bitsandbytes)", True)
    is_channels = any(s.name == wrong and s.kind == "ffn" for s in structures)
    remedy = f"; slim_round_to={_MULTIPLE}" if is_channels else ""
    note = f"{wrong} reads {widths[wrong]}, no multiple of {_MULTIPLE}{remedy}"
    return WayOut("4-bit on a CPU (bitsandbytes)", False, note)


_WAYS: tuple[Callable[[PreTrainedModel, Sequence[Structure], Any], WayOut | None], ...] = (
    *(_load, _export, _serve, _convert, _write_gguf, _batch, _quantize, _quantize_to_four_bits),
)
"""A function for each row: it says whether a model is taken, or None where that is no question for it."""
