"""Where the parameters and operations of a model are: embeddings, attention, feed-forward networks, head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from ..modeling_hf_slim import find_base
from ..structures import Discovery, get_module
from .flop_costs import find_own

PartName = Literal["embeddings", "attention", "ffn", "head", "other"]

_CALLED: tuple[tuple[PartName, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"Attention|Attn")),
    ("ffn", re.compile(r"MLP|Mlp|FeedForward|FFN|Expert|MoE|Moe")),
    ("embeddings", re.compile(r"Embed")),
)


@dataclass(frozen=True)
class ModelPart:
    """What of a model's cost is in one part of it.

    Args:
        name: `embeddings`, `attention`, `ffn`, `head` (what makes logits or lies outside the base model) or `other`.
        parameters: Parameters in it; one that is tied counts where the model has it first.
        flops: Operations of a forward pass in it; None where they were not counted.
    """

    name: PartName
    parameters: int
    flops: int | None


def count_parts(model: PreTrainedModel, found: Discovery, flops: Mapping[str, int] | None) -> tuple[ModelPart, ...]:
    """Count where the parameters and operations of a model are.

    A module belongs to the structure that it is in, else to what it, or the nearest module around it, is called.

    Args:
        model: The model.
        found: What `find_structures` found in it.
        flops: For each module's dotted name its operations, those of what is in it included; that of all by no name.

    Returns:
        The parts, all five.
    """
    known: dict[str, PartName] = {skip.name: _of_kind(skip.kind) for skip in found.skipped}
    for structure in found.structures:
        known |= {m.tensor.rpartition(".")[0]: _of_kind(structure.kind) for m in structure.members}
    outputs = model.get_output_embeddings()
    known |= {name: "head" for name, module in model.named_modules() if module is outputs}
    parameters = dict.fromkeys(get_args(PartName), 0)
    for name, parameter in model.named_parameters():
        parameters[_find_part(model, known, name.rpartition(".")[0])] += parameter.numel()
    operations = dict.fromkeys(get_args(PartName), 0)
    for path, number in find_own(flops or {}).items():
        operations[_find_part(model, known, path)] += number
    return tuple(ModelPart(name, parameters[name], None if flops is None else operations[name]) for name in parameters)


def _of_kind(kind: str) -> PartName:
    return "attention" if kind == "mha" else "ffn"


def _find_part(model: PreTrainedModel, known: Mapping[str, PartName], path: str) -> PartName:
    base = find_base(model)[0]
    for name in _paths_around(path):
        if name in known:
            return known[name]
        module = get_module(model, name)
        called = next((part for part, pattern in _CALLED if pattern.search(type(module).__name__)), None)
        if called is not None or isinstance(module, nn.Embedding):
            return called or "embeddings"
    return "head" if base and not f"{path}.".startswith(f"{base}.") and path else "other"


def _paths_around(path: str) -> Iterator[str]:
    """A module's name and those of the modules around it, but for the model's own."""
    while path:
        yield path
        path = path.rpartition(".")[0]
