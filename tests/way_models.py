"""Small models of five families, dense and slim, saved with what turns text or pictures into their inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tiny import randomize
from transformers import PreTrainedModel, ViTImageProcessor

from hf_slim import find_structures, model_slim
from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.compaction.zeros import zero_units

VOCAB = 257
TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
STACK = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 1024}


class Family(NamedTuple):
    """A class of transformers and the fields of a small config of it."""

    auto_class: str
    model_class: str
    config_class: str
    fields: dict


FAMILIES = {
    "BERT": Family(
        "AutoModelForSequenceClassification", "BertForSequenceClassification", "BertConfig", {**TEXT, **STACK}
    ),
    "GPT-2": Family(
        "AutoModelForCausalLM",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TEXT, "n_embd": 256, "n_layer": 3, "n_head": 4, "n_inner": 1024, "n_positions": 512},
    ),
    "Llama": Family(
        "AutoModelForCausalLM",
        "LlamaForCausalLM",
        "LlamaConfig",
        {**TEXT, **STACK, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    ),
    "T5": Family(
        "AutoModelForSeq2SeqLM",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **TEXT,
            "d_model": 256,
            "num_layers": 3,
            "num_heads": 4,
            "d_kv": 64,
            "d_ff": 1024,
            "decoder_start_token_id": 0,
        },
    ),
    "ViT": Family(
        "AutoModelForImageClassification",
        "ViTForImageClassification",
        "ViTConfig",
        {**STACK, "image_size": 64, "patch_size": 16},
    ),
    "Qwen2": Family(
        "AutoModelForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**TEXT, **STACK, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}
SHAPES = ("dense", "uniform", "non-uniform", "multiples of 64")
"""Half of the units of every layer; in each layer another number; the same, but channels in multiples of 64."""


def build_way_model(family: str, shape: str = "dense") -> PreTrainedModel:
    """Build a small model whose every unit matters.

    Args:
        family: A name in `FAMILIES`.
        shape: One of `SHAPES`.

    Returns:
        The model, float32, in evaluation mode, the same every time.
    """
    _, model_class, config_class, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).eval()
    randomize(model)
    return model if shape == "dense" else slim_to(model, shape)


def slim_to(model: PreTrainedModel, shape: str) -> PreTrainedModel:
    """Zero units of a model and remove them.

    Args:
        model: The model; it stays as it is.
        shape: One of `SHAPES` but for `dense`.

    Returns:
        The slim model.
    """
    slim = copy.deepcopy(model)
    structures = find_structures(slim).structures
    generator = torch.Generator().manual_seed(2)
    masks = {}
    for number, structure in enumerate(structures):
        kept = _count_kept(structure.units, structure.kind, number, shape)
        masks[structure.name] = torch.randperm(structure.units, generator=generator) < kept
    zero_units(slim, structures, masks)
    return model_slim(slim, round_multiplier=1)


def save_way_model(family: str, shape: str, folder: Path) -> PreTrainedModel:
    """Save a small model with its tokenizer or image processor.

    Args:
        family: A name in `FAMILIES`.
        shape: One of `SHAPES`.
        folder: Where to.

    Returns:
        The model as `from_pretrained` loads it.
    """
    build_way_model(family, shape).save_pretrained(folder)
    if family == "ViT":
        ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    else:
        make_byte_tokenizer().save_pretrained(folder)
    return getattr(transformers, FAMILIES[family].auto_class).from_pretrained(folder, dtype=torch.float32).eval()


def make_way_batch(model: PreTrainedModel, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Make inputs of a model.

    Args:
        model: A model of `build_way_model`.
        rows: The size of the batch.
        length: The length of the texts, which pictures do not have.

    Returns:
        Keyword arguments of the forward pass, without labels.
    """
    generator = torch.Generator().manual_seed(rows)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(1, VOCAB, (rows, length), generator=generator)
    return batch


def _count_kept(units: int, kind: str, number: int, shape: str) -> int:
    """How many units of the structure with this number are kept."""
    if shape == "uniform":
        return units // 2
    if kind == "mha":
        return max(1, units // 2 + (number // 2) % 3 - 1)
    if shape == "multiples of 64":
        return 64 * (units // 128 + number % 3)
    return units // 2 - 37 * (number % 3) - 5
