"""GGUF, the file of llama.cpp: a slim Llama or Qwen2 with the sizes of every layer."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .gguf_tokenizer import Vocabulary, read_vocabulary

_CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
"""What computes what llama.cpp's graphs of `llama` and `deci` compute."""
_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What GGUF calls the modules, those of a layer without its number."""
MATRICES = torch.float16
"""What matrices are written as; vectors are written in float32."""
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_ROUNDING = 1e-3
"""What rounding to float16 may change of a tensor; it changes 0.0002 to 0.0005 where no number is small."""
_ROWS = 1024
"""Of a tensor that are compared at a time."""
_SCALED = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose frequencies are the same for all lengths."""


class LayerSizes(NamedTuple):
    """How many units each layer has, a number for each layer.

    Args:
        heads: Attention heads.
        groups: Key-value heads.
        channels: Intermediate channels.
    """

    heads: list[int]
    groups: list[int]
    channels: list[int]

    @property
    def are_uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return all(len(set(numbers)) == 1 for numbers in self)


def export_gguf(folder: str | Path, out: str | Path) -> Path:
    """Write a Llama or Qwen2 as a GGUF file that llama.cpp loads, its layers of whatever sizes they have.

    Matrices are in float16, vectors in float32; `llama-quantize` makes it smaller. Where all layers have the same
    sizes the file is of the architecture `llama`; else of `deci`, which builds every layer by its own sizes and
    computes the same. (`llama` and `qwen2` want every layer to be like the first, and `qwen2` heads that are together
    as wide as the model.) Query and key are reordered, since both rotate neighbours where transformers rotates
    halves. Needs the package gguf: `pip install gguf`.

    Args:
        folder: A model that `save_slimmed` or `save_pretrained` wrote, or a Hub name; slim or not. Its tokenizer is
            written, too, if it has one; without, the file takes token ids alone.
        out: The file; a GGUF file that is there is replaced, and no other.

    Returns:
        The file.

    Raises:
        ImportError: If the package gguf is not installed.
        ValueError: If llama.cpp has no graph that computes what the model computes, or does not know its tokenizer, or
            a file cannot be written there, or would be lost. Nothing is written.
    """
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError("GGUF files take the package gguf: `pip install gguf`.") from error
    out = Path(out)
    _check_paths(Path(folder), out)
    check_computation(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    sizes = read_sizes(model)
    vocabulary = read_vocabulary(_load_tokenizer(folder), model.config.vocab_size)
    tensors = dict(convert_tensors(model))
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as apart:  # a name that no file there has
        part = Path(apart, out.name)
        writer = gguf.GGUFWriter(part, "llama" if sizes.are_uniform else "deci")
        _write_fields(writer, model, sizes)
        _write_vocabulary(writer, vocabulary, model.config)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(out)
    return out


def _check_paths(folder: Path, out: Path) -> None:
    """Refuse a file in place of the model, and a place for the new file where none can be or another would be lost."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name the folder that the model was saved in.")
    if not out.name or out.is_dir():
        raise ValueError(f"{out} is a folder: name the file to write, such as {out / 'model.gguf'}.")
    if not out.parent.is_dir():
        raise ValueError(f"There is no folder {out.parent} for {out.name}: make it, or name another.")
    if out.exists():
        with out.open("rb") as file:
            if file.read(4) not in (b"", b"GGUF"):
                raise ValueError(f"{out} is there and is no GGUF file, so that it would be lost: name another file.")


def check_computation(config: PreTrainedConfig) -> None:
    """Refuse what llama.cpp's graph of a Llama with layers of their own sizes does not compute.

    Args:
        config: The config of a saved model.

    Raises:
        ValueError: What it is, and what can be written.
    """
    name = next(iter(config.architectures or []), f"model of the type {config.model_type}")
    rotary = getattr(config, "rope_parameters", None) or {}
    found = None
    if name not in _CLASSES:
        found = f"is a {name}"
    elif config.hidden_act != "silu":
        found = f"has hidden_act={config.hidden_act!r}, where llama.cpp computes silu"
    elif rotary.get("rope_type", "default") not in _SCALED:
        found = f"has rotary embeddings of the type {rotary['rope_type']!r}"
    elif rotary.get("partial_rotary_factor", 1) != 1:
        found = "rotates a part of each head"
    elif getattr(config, "use_sliding_window", False):
        found = "has sliding windows"
    if found:
        raise ValueError(
            f"The model {found}: llama.cpp has no graph that computes this with layers of sizes of their own. A GGUF "
            f"file can be written of {' and '.join(_CLASSES)} with plain, linear or llama3 rotary embeddings."
        )


def read_sizes(model: PreTrainedModel) -> LayerSizes:
    """Read the sizes of the layers off their weights.

    Args:
        model: A Llama or Qwen2.

    Returns:
        The sizes.
    """
    layers = model.get_decoder().layers
    width = layers[0].self_attn.head_dim
    return LayerSizes(
        [layer.self_attn.q_proj.out_features // width for layer in layers],
        [layer.self_attn.k_proj.out_features // width for layer in layers],
        [layer.mlp.down_proj.in_features for layer in layers],
    )


def convert_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert the weights, one at a time.

    Args:
        model: A Llama or Qwen2.

    Yields:
        The name in the file and the tensor: matrices in float16, vectors in float32.

    Raises:
        ValueError: If a tensor has no place in the file, or has numbers that are too large for float16, or so small
            that the tensor would be further off than float16 is otherwise.
    """
    width = model.get_decoder().layers[0].self_attn.head_dim
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        match = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match is None or match[2] not in _NAMES:
            raise ValueError(f"{name} has no place in a GGUF file of a Llama: export the model without it.")
        if match[2] in _ROTATED:
            tensor = tensor.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
        converted = _to_file(name, tensor.detach().cpu())
        layer = "" if match[1] is None else f"blk.{match[1]}."
        yield f"{layer}{_NAMES[match[2]]}.{match[3]}", converted
    factors = _find_rotary_factors(model)
    if (factors != 1).any():
        yield "rope_freqs.weight", factors


def _to_file(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The numbers as the file has them."""
    kind = MATRICES if tensor.dim() == 2 else torch.float32
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has numbers that are not finite, so that no file is written.")
    converted = tensor.to(kind).contiguous()
    limits, what = torch.finfo(kind), f"that {str(kind).removeprefix('torch.')}"
    if not converted.isfinite().all():
        most = f"{limits.max:.6g}"
        raise ValueError(f"{name} has numbers {what} cannot hold (above {most}), so that no file is written.")
    lost = _measure_loss(converted, tensor)
    if lost > _ROUNDING:
        raise ValueError(
            f"{name} has numbers so small {what} loses {100 * lost:.1f}% of the tensor (below "
            f"{limits.smallest_normal:.1g} it has few digits), so that no file is written."
        )
    return converted


def _measure_loss(converted: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of what is lost, as a fraction of that of a tensor; 0 for a tensor of zeros."""
    off = norm = 0.0
    for rows, exact_rows in zip(converted.split(_ROWS), exact.split(_ROWS), strict=True):
        off += (rows.double() - exact_rows.double()).square().sum().item()
        norm += exact_rows.double().square().sum().item()
    return math.sqrt(off / norm) if norm else 0.0


def _find_rotary_factors(model: PreTrainedModel) -> torch.Tensor:
    """What llama.cpp divides the frequencies of plain rotary embeddings by, in float32."""
    width = model.get_decoder().layers[0].self_attn.head_dim
    base = model.config.rope_parameters["rope_theta"]
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / model.get_decoder().rotary_emb.inv_freq.float().cpu()


def _write_fields(writer: Any, model: PreTrainedModel, sizes: LayerSizes) -> None:
    config = model.config
    width = model.get_decoder().layers[0].self_attn.head_dim
    writer.add_name(Path(config.name_or_path).name or type(model).__name__)
    writer.add_file_type(1)  # matrices in float16
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    one = sizes.are_uniform
    writer.add_feed_forward_length(sizes.channels[0] if one else sizes.channels)
    writer.add_head_count(sizes.heads[0] if one else sizes.heads)
    writer.add_head_count_kv(sizes.groups[0] if one else sizes.groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_vocabulary(writer: Any, vocabulary: Vocabulary | None, config: Any) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(vocabulary.adds_end)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model; None where it has none."""
    path = Path(folder)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder)
