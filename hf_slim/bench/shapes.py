"""The models of `hf-slim bench`: shapes by name, and dense, slim and stock models of them with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from ..arguments import SlimConfig
from ..compaction import compact_model, has_record, model_slim, record_shapes, zero_units
from ..saving import count_bytes, count_parameters
from ..structures import Discovery, Kind, Structure, find_structures, get_tensor, require_structures
from ..training import select_units
from .flags import BenchArguments, Sparsity

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bge-small": lambda: BertConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
    ),
    "bge-base": BertConfig,
    "bert-large": lambda: BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "gpt2": GPT2Config,
    "llama-1b": lambda: LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
        max_position_embeddings=2048,
    ),
}
"""Configs by the names of shapes; llama-1b is TinyLlama, 1.1 billion parameters."""

_FIRST_TOKEN = 5  # those before are special in BERT
_SEED = 0


@dataclass(frozen=True)
class Case:
    """One shape at one sparsity.

    Args:
        name: Name of the shape, or the path of its config.
        sparsity: What is removed of each layer.
        config: The config of the dense model.
        slim_config: That of the slim model, with a shape record where the config's own fields cannot express it.
        masks: For each structure's name what the slim model keeps: random units, their number the same in all layers.
        parameters: Parameters of the dense model.
        slim_parameters: Parameters of the slim model.
        bytes: Bytes that the dense model saves.
        slim_bytes: Bytes that the slim model saves.
        removed: Fraction of the weights of all structures that the slim model lacks.
    """

    name: str
    sparsity: Sparsity
    config: PreTrainedConfig
    slim_config: PreTrainedConfig
    masks: dict[str, torch.Tensor]
    parameters: int
    slim_parameters: int
    bytes: int
    slim_bytes: int
    removed: float

    @property
    def is_stock(self) -> bool:
        """Whether the config's own fields express the slim shape."""
        return not has_record(self.slim_config)

    def to_record(self, batch_size: int | None = None, length: int | None = None) -> dict[str, Any]:
        """What tells this case, and the size of its batches, from others, for JSON."""
        size = {} if batch_size is None else {"batch_size": batch_size, "sequence_length": length}
        return {"model": self.name, "layers": self.config.num_hidden_layers, "sparsity": str(self.sparsity), **size}


def make_cases(arguments: BenchArguments) -> list[Case]:
    """Every shape with every number of layers at every sparsity, before any of them is built.

    Args:
        arguments: The flags.

    Returns:
        The cases.

    Raises:
        ValueError: If a model is unknown or no text model with a known head, is too short for the sequences, or cannot
            reach a sparsity.
    """
    return [
        _make_case(name, config, sparsity, arguments.torch_dtype)
        for name in arguments.models
        for config in _load_configs(name, arguments)
        for sparsity in arguments.parsed_sparsities
    ]


def slim_settings(sparsity: Sparsity, **changes: Any) -> SlimConfig:
    """The settings that slim a model to the shape of a case.

    Args:
        sparsity: What is removed of each layer.
        **changes: Other fields.

    Returns:
        Default settings but for the scope, which is `local`, so that all layers end with the same sizes.
    """
    return SlimConfig(ffn2_sparsity=sparsity.ffn2, mha_sparsity=sparsity.mha, slim_scope="local", **changes)


def build_model(config: PreTrainedConfig, arguments: BenchArguments) -> PreTrainedModel:
    """Build a model from its config alone; the same weights each time.

    Args:
        config: The config.
        arguments: The flags: type and device.

    Returns:
        The model.
    """
    set_seed(_SEED)
    model = _auto_class(config).from_config(copy.deepcopy(config), dtype=arguments.torch_dtype)
    return model.to(arguments.torch_device)


def build_masked(case: Case, arguments: BenchArguments) -> PreTrainedModel:
    """Build a dense model and zero the units that the slim model lacks.

    Args:
        case: The case.
        arguments: The flags: type and device.

    Returns:
        The masked model.
    """
    model = build_model(case.config, arguments)
    zero_units(model, find_structures(model).structures, case.masks)
    return model


def build_slim(case: Case, arguments: BenchArguments) -> PreTrainedModel:
    """Build a masked model and remove its zero units.

    Args:
        case: The case.
        arguments: The flags: type and device.

    Returns:
        The slim model.
    """
    model = build_masked(case, arguments)
    model_slim(model, slim_settings(case.sparsity).slim_round_to, verify=False)
    return model


def build_meta(config: PreTrainedConfig, **keywords: Any) -> PreTrainedModel:
    """Build a model without values.

    Args:
        config: The config.
        **keywords: As for `from_config`.

    Returns:
        The model on the meta device.
    """
    with torch.device("meta"):
        model = _auto_class(config).from_config(copy.deepcopy(config), **keywords)
    model.tie_weights()
    return model


def load_model(case: Case, folder: Path, arguments: BenchArguments) -> PreTrainedModel:
    """Load a model that was saved.

    Args:
        case: The case.
        folder: Where it was saved.
        arguments: The flags: type and device.

    Returns:
        The model.
    """
    model = _auto_class(case.config).from_pretrained(folder, dtype=arguments.torch_dtype)
    return model.to(arguments.torch_device)


def make_batch(
    config: PreTrainedConfig, batch_size: int, length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Make random tokens, with labels.

    Args:
        config: The config of the model.
        batch_size: Sequences.
        length: Tokens in each.
        device: Where the tensors are wanted.

    Returns:
        `input_ids` of shape `[batch_size, length]`; `labels` of the same shape for a language model, `[batch_size]`
        for a classifier.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shape = (batch_size, length)
    ids = torch.randint(min(_FIRST_TOKEN, config.vocab_size - 1), config.vocab_size, shape, generator=generator)
    labels = ids if _auto_class(config) is AutoModelForCausalLM else ids[:, 0] % 2
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def count_flops(config: PreTrainedConfig, batch_size: int, length: int, *, backward: bool = False) -> int:
    """Count the floating-point operations of the matrix products of one pass.

    Two for each multiplication with its addition, as `FlopCounterMode` of PyTorch counts them, on the meta device and
    with attention as separate matrix products, since kernels that fuse it are not all counted.

    Args:
        config: The config of the model, with its shape record if it has one.
        batch_size: Sequences.
        length: Tokens in each.
        backward: Count a forward pass with the loss and its backward pass, not the forward pass alone.

    Returns:
        The number of operations.
    """
    model = build_meta(config, attn_implementation="eager")
    batch = make_batch(config, batch_size, length, torch.device("meta"))
    if not backward:
        del batch["labels"]
    with FlopCounterMode(display=False) as counter:
        output = model(**batch)
        if backward:
            output.loss.backward()
    return counter.get_total_flops()


def _load_configs(name: str, arguments: BenchArguments) -> Iterator[PreTrainedConfig]:
    if name in SHAPES:
        config = SHAPES[name]()
    elif Path(name).exists():
        config = AutoConfig.from_pretrained(name)
    else:
        raise ValueError(
            f"--models {name}: there is no such shape, file or folder. Name one of {', '.join(SHAPES)}, or a folder "
            "or .json file with a config."
        )
    _check_config(name, config, max(arguments.sequence_lengths))
    for layers in arguments.layers or [config.num_hidden_layers]:
        fields = config.to_dict() | {"num_hidden_layers": layers}
        if layers != config.num_hidden_layers:
            fields.pop(config.attribute_map.get("num_hidden_layers"), None)
            fields.pop("layer_types", None)  # one for each layer; made anew for the new number
        yield type(config).from_dict(fields)


def _check_config(name: str, config: PreTrainedConfig, length: int) -> None:
    heads = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    is_text = config.get_text_config() is config and not config.is_encoder_decoder
    if not is_text or not any(type(config) in mapping for mapping in heads):
        raise ValueError(
            f"--models {name} is a {config.model_type} model; bench takes text encoders that classify sequences and "
            "decoders that model language, since it makes batches of tokens for them."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"--sequence_lengths {length} is more than {name} takes, {positions}: make it smaller.")


def _make_case(name: str, config: PreTrainedConfig, sparsity: Sparsity, dtype: torch.dtype) -> Case:
    model = build_meta(config, dtype=dtype)
    structures = require_structures(model, find_structures(model))
    parameters, size, weights = count_parameters(model), count_bytes(model), _count_weights(model, structures)
    try:
        masks = _select(model, structures, sparsity)
    except ValueError as error:
        raise ValueError(f"--models {name} with --sparsities {sparsity}: {error}") from None
    record_shapes(model, compact_model(model, structures, masks))
    return Case(
        name=name,
        sparsity=sparsity,
        config=config,
        slim_config=model.config,
        masks=masks,
        parameters=parameters,
        slim_parameters=count_parameters(model),
        bytes=size,
        slim_bytes=count_bytes(model),
        removed=1 - _count_weights(model, structures) / weights,
    )


def _select(model: PreTrainedModel, structures: tuple[Structure, ...], sparsity: Sparsity) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    settings = slim_settings(sparsity)
    masks = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    scores = {s.name: torch.rand(s.units, generator=generator) for s in structures}
    kinds: tuple[tuple[Kind, float], ...] = (("ffn", sparsity.ffn2), ("mha", sparsity.mha))
    for kind, fraction in kinds:
        if fraction:
            masks |= select_units(
                require_structures(model, Discovery(structures), kind),
                scores,
                masks,
                fraction,
                scope=settings.slim_scope,
                round_to=settings.slim_round_to,
                min_heads=settings.slim_min_heads,
            )
    return masks


def _count_weights(model: PreTrainedModel, structures: tuple[Structure, ...]) -> int:
    names = dict.fromkeys(member.tensor for s in structures for member in s.members)
    return sum(get_tensor(model, name).numel() for name in names)


def _is_decoder(config_class: type[PreTrainedConfig]) -> bool:
    """Whether models of a config are language models: those that predict masked words are encoders."""
    if config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return True
    return config_class in MODEL_FOR_CAUSAL_LM_MAPPING and config_class not in MODEL_FOR_MASKED_LM_MAPPING


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM if _is_decoder(type(config)) else AutoModelForSequenceClassification
