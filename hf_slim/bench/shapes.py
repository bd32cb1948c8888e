"""The models of `hf-slim bench`: shapes by name, and dense, slim and stock models of them with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
from ..training import check_reachable, select_units
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
        arguments: The flags: type, device, repeats.
        batch_size: Sequences in a batch, 0 where there are no batches.
        length: Tokens in a sequence.
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
    arguments: BenchArguments
    batch_size: int = 0
    length: int = 0

    def __str__(self) -> str:
        """What tells this case from others, for the progress bar."""
        size = f", {self.batch_size} x {self.length}" if self.batch_size else ""
        return f"{self.name}, {self.config.num_hidden_layers} layers, {self.sparsity}{size}"

    @property
    def is_stock(self) -> bool:
        """Whether the config's own fields express the slim shape."""
        return not has_record(self.slim_config)

    @property
    def device(self) -> torch.device:
        """Where to measure."""
        return torch.device(self.arguments.device)

    def to_record(self) -> dict[str, Any]:
        """What tells this case from others, for JSON."""
        size = {"batch_size": self.batch_size, "sequence_length": self.length} if self.batch_size else {}
        return {"model": self.name, "layers": self.config.num_hidden_layers, "sparsity": str(self.sparsity), **size}

    def settings(self, **changes: Any) -> SlimConfig:
        """The settings that slim a model to this shape, with some fields changed."""
        return _slim_settings(self.sparsity, **changes)

    def build(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Build the dense model, or that of another config, from the config alone; the same weights each time."""
        set_seed(_SEED)
        config = copy.deepcopy(config or self.config)
        return _auto_class(config).from_config(config, dtype=self.arguments.torch_dtype).to(self.device)

    def build_masked(self) -> PreTrainedModel:
        """Build the dense model and zero the units that the slim model lacks."""
        model = self.build()
        zero_units(model, find_structures(model).structures, self.masks)
        return model

    def build_slim(self) -> PreTrainedModel:
        """Build the masked model and remove its zero units."""
        model = self.build_masked()
        self.slim(model)
        return model

    def slim(self, model: nn.Module) -> None:
        """Remove the zero units of a masked model."""
        model_slim(model, self.settings().slim_round_to, verify=False)

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a model that was saved."""
        model = _auto_class(self.config).from_pretrained(folder, dtype=self.arguments.torch_dtype)
        return model.to(self.device)

    def make_batch(self, batches: int = 1, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Make random tokens.

        Args:
            batches: Make so many batches, as one.
            device: Where the tensors are wanted, if not where is measured.

        Returns:
            `input_ids` of shape `[batches * batch_size, length]`; `labels` of the same shape for a language model,
            `[batches * batch_size]` for a classifier.
        """
        generator = torch.Generator().manual_seed(_SEED)
        shape, words = (batches * self.batch_size, self.length), self.config.vocab_size
        ids = torch.randint(min(_FIRST_TOKEN, words - 1), words, shape, generator=generator)
        labels = ids if _auto_class(self.config) is AutoModelForCausalLM else ids[:, 0] % 2
        return {"input_ids": ids.to(device or self.device), "labels": labels.to(device or self.device)}

    def count_flops(self, *, slim: bool = False, backward: bool = False) -> int:
        """Count the floating-point operations of the matrix products of one pass over a batch.

        Two for each multiplication with its addition, as `FlopCounterMode` of PyTorch counts them, on the meta device
        and with attention as separate matrix products, since kernels that fuse it are not all counted.

        Args:
            slim: Count those of the slim model, not of the dense one.
            backward: Count a forward pass with the loss and its backward pass, not the forward pass alone.

        Returns:
            The number of operations.
        """
        model = build_meta(self.slim_config if slim else self.config, attn_implementation="eager")
        batch = self.make_batch(device=torch.device("meta"))
        if not backward:
            del batch["labels"]
        with FlopCounterMode(display=False) as counter:
            output = model(**batch)
            if backward:
                output.loss.backward()
        return counter.get_total_flops()


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
        _make_case(name, config, sparsity, arguments)
        for name in arguments.models
        for config in _load_configs(name, arguments)
        for sparsity in arguments.parsed_sparsities
    ]


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


def _make_case(name: str, config: PreTrainedConfig, sparsity: Sparsity, arguments: BenchArguments) -> Case:
    model = build_meta(config, dtype=arguments.torch_dtype)
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
        arguments=arguments,
    )


def _slim_settings(sparsity: Sparsity, **changes: Any) -> SlimConfig:
    """Default settings but for the scope, so that all layers end with the same sizes."""
    return SlimConfig(ffn2_sparsity=sparsity.ffn2, mha_sparsity=sparsity.mha, slim_scope="local", **changes)


def _select(model: PreTrainedModel, structures: tuple[Structure, ...], sparsity: Sparsity) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    settings = _slim_settings(sparsity)
    masks = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}
    scores = {s.name: torch.rand(s.units, generator=generator) for s in structures}
    kinds: tuple[tuple[Kind, float], ...] = (("ffn", sparsity.ffn2), ("mha", sparsity.mha))
    for kind, fraction in kinds:
        if fraction:
            chosen = require_structures(model, Discovery(structures), kind)
            limits: dict[str, Any] = {
                "scope": settings.slim_scope,
                "round_to": settings.slim_round_to,
                "min_heads": settings.slim_min_heads,
            }
            check_reachable(chosen, fraction, **limits)
            masks |= select_units(chosen, scores, masks, fraction, **limits)
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
