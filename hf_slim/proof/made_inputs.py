"""Inputs for a model, made from its config, its modules and the signature of its forward pass.

Where these do not say which of several shapes an input has (spectrograms are `[mel bins, frames]` in one model and
`[frames, mel bins]` in another), the first shape that the tower for this input runs on is taken.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_torchvision_available

from ..parallel import find_device
from .made_media import (
    SEED,
    Inputs,
    Taker,
    make_features,
    make_images,
    make_noise,
    make_series,
    make_videos,
    make_waves,
    name_parameters,
    walk_configs,
)
from .module_state import leaving

LENGTH = 16
RUN_ERRORS = (
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    AssertionError,
    ArithmeticError,
)
"""What a model raises on inputs that it cannot take."""

_MODALITIES = ("text", "image", "video", "audio")
_MAKERS = (("image", make_images), ("video", make_videos), ("audio", make_features), ("audio", make_waves))
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
_QUERIES = ("num_query_tokens", "latent_query_num")

_SHAPES: dict[str, tuple[int | str, ...]] = {
    "states": (1, LENGTH, "state_dim"),
    "actions": (1, LENGTH, "act_dim"),
    "rewards": (1, LENGTH, 1),
    "returns_to_go": (1, LENGTH, 1),
    "visual_feats": (1, 4, "visual_feat_dim"),
    "visual_pos": (1, 4, "visual_pos_dim"),
    "visual_embeds": (1, 4, "visual_embedding_dim"),
    "input_points": (1, 1, 1, 2),
    "inputs": (1, LENGTH, "d_model"),
    "inputs_embeds": (1, LENGTH, "hidden_size"),
    "query_embeds": (1, LENGTH, "hidden_size"),
    "latents": (1, "hidden_size", LENGTH),
    "decoder_input_values": (1, LENGTH, "num_mel_bins"),
    "encoder_hidden_states": (1, LENGTH, "encoder_hidden_size"),
}
"""Floating-point arguments that have one shape in all models, with the config fields that say it."""
_STAND_INS = ("inputs", "inputs_embeds", "query_embeds", "latents")
"""Those of them that are made only for a model that cannot do without."""


def make_inputs(model: PreTrainedModel, length: int = LENGTH) -> Inputs:
    """Make a random example that a model runs on, the same every time.

    Every tower takes part: a model for images and text gets an image, and as many placeholder tokens in its text as
    the image gives vectors.

    Args:
        model: A text, vision, audio, time-series, encoder-decoder or multimodal model; it is run, in evaluation mode.
        length: Tokens of a text; half as many as the model has positions, if that is less.

    Returns:
        Keyword arguments for its forward pass, on its device, floating-point ones in its dtype: `input_ids` of shape
        `[1, length]`, `pixel_values` of shape `[1, channels, height, width]`, and so on.

    Raises:
        ValueError: If the model takes something else, or runs on nothing that was tried; the message says how to pass
            a batch.
    """
    example = _Example(model, length)
    texts = example.make()
    missing = next((name for name in example.required if name not in texts[0]), None)
    if missing is not None:
        raise ValueError(
            f"{type(model).__name__} takes {missing}, for which no input can be made: pass a batch of yours, "
            f"verify={{'{missing}': ...}}, or verify=False."
        )
    place, _, error = _find_running(model, model, texts)
    if error is not None:
        raise ValueError(
            f"{type(model).__name__} cannot run on any input that was made for it: on {describe(texts[0])}: {error} "
            "Pass a batch of yours, verify={...}, or verify=False."
        ) from error
    return texts[place]


def _find_running(
    model: PreTrainedModel, function: Callable[..., Any], variants: Sequence[Inputs]
) -> tuple[int, Any, Exception | None]:
    """Which is the first that a function of the model runs on, and what it gives; else 0 and the first error."""
    first: Exception | None = None
    for place, inputs in enumerate(variants):
        try:
            with evaluating(model):
                return place, function(**inputs), None
        except RUN_ERRORS as error:
            first = first or error
    return 0, None, first


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients and with the same random numbers every time.

    Args:
        model: The model; afterwards its training mode is restored, the state of the generators, and what else the
            forward pass has changed: caches, counters, buffers.

    Yields:
        Nothing.
    """
    with leaving(model), torch.no_grad(), _seeded():
        model.eval()
        _run_plainly(model)
        yield


def _run_plainly(model: nn.Module) -> None:
    """Let compiled modules run as they are written: to compile them for one batch would take longer than to run it."""
    for module in model.modules():
        module.__dict__.pop("_compiled_call_impl", None)
        original = getattr(module, "_orig_mod", None)
        if original is not None:
            module.__dict__["forward"] = original.__call__


@contextmanager
def _seeded() -> Iterator[None]:
    """Begin with the same random numbers every time, and go on with the old ones afterwards."""
    with keeping_random_state():
        torch.manual_seed(SEED)
        random.seed(SEED)
        numpy.random.seed(SEED)
        yield


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Let random numbers go on afterwards as if none had been drawn.

    Yields:
        Nothing.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def describe(inputs: Mapping[str, Any]) -> str:
    """The names and shapes of inputs, for messages.

    Args:
        inputs: Keyword arguments for a forward pass.

    Returns:
        For example `input_ids (1, 16), pixel_values (1, 3, 32, 32)`.
    """
    return ", ".join(
        f"{name} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else name for name, value in inputs.items()
    )


class _Example(Taker):
    """The arguments of one model's forward pass, decided for each modality by itself."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        """See the class."""
        super().__init__(model)
        self._length = length

    def make(self) -> list[Inputs]:
        """Inputs for the model; the text in the forms that it may have, likeliest first."""
        inputs = self._others()
        vectors: dict[str, int] = {}
        for modality, make in _MAKERS:
            variants = [variant for variant in make(self) if self.names & variant.keys()]
            if variants:
                inputs |= self._decide(modality, variants, inputs, vectors)
        return [self._fit(self.names, {**inputs, **text}) for text in self._texts(vectors)]

    def _decide(self, modality: str, variants: list[Inputs], others: Inputs, vectors: dict[str, int]) -> Inputs:
        """The variant that the tower of a modality runs on; how many vectors in the text it becomes is noted."""
        has_places = self._placeholder(modality) is not None or f"{modality}_embeds_position_mask" in self.names
        if has_places:
            vectors[modality] = self.find_size(_QUERIES, 1)
        get_features = self.find_features(modality) if has_places else None
        tower = get_features or self.find_tower(next(name for name in variants[0] if name in self.names))
        if tower is None or (get_features is None and len(variants) == 1):
            return variants[0]
        names = name_parameters(getattr(tower, "forward", tower))
        fitting = [self._fit(names, {**others, **variant}) for variant in variants]
        place, features, error = _find_running(self.model, tower, fitting)
        if get_features is None:
            return variants[place]
        if error is not None:
            raise ValueError(
                f"{type(self.model).__name__} takes no {modality} that could be made for it: on "
                f"{describe(fitting[0])}: {error} Pass a batch of yours, verify={{...}}, or verify=False."
            ) from error
        found = getattr(features, "pooler_output", None)
        found = features if isinstance(features, torch.Tensor) else features[0] if found is None else found
        count = sum(tensor.numel() // tensor.shape[-1] for tensor in _tensors(found))
        vectors[modality] = self.find_size(_QUERIES, count)
        return fitting[place]

    def _fit(self, names: Collection[str], inputs: Inputs) -> Inputs:
        """Those inputs that a function takes, on the device and in the dtype of the model."""
        fitting = {name: value.to(find_device(self.model)) for name, value in inputs.items() if name in names}
        return {n: v.to(self.model.dtype) if v.is_floating_point() else v for n, v in fitting.items()}

    def _placeholder(self, modality: str) -> int | None:
        words = [modality, f"{modality}_context"]
        token = self.find([f"{word}_token_{end}" for word in words for end in ("id", "index")])
        return token if token is not None else (self.find(("vocabulary_map",)) or {}).get(f"<{modality}>")

    def _texts(self, vectors: dict[str, int]) -> Iterator[Inputs]:
        text = self._text(vectors)
        yield text
        if "decoder_input_ids" in self.names and not vectors:
            yield {"decoder_input_ids": text["decoder_input_ids"]}
        if "input_ids" in self.names:
            mask = torch.ones_like(text["input_ids"])
            yield {**text, "attention_mask": mask, "image_attention_mask": mask[..., None]}
            yield {name: value.unsqueeze(1).repeat_interleave(2, 1) for name, value in text.items()}

    def _text(self, vectors: dict[str, int]) -> Inputs:
        """Token ids, with placeholders in the middle, and what goes with each token."""
        config = self.model.config.get_text_config(encoder=True if self.model.config.is_encoder_decoder else None)
        default = 2 * self._length
        positions = next((p for n in _POSITIONS if (p := getattr(config, n, None)) is not None and p > 0), default)
        ids = self._random_ids(config, min(self._length, positions // 2))
        half = ids.shape[1] // 2
        types = [torch.full((1, count), _MODALITIES.index(modality)) for modality, count in vectors.items()]
        tokens = [(self._placeholder(modality), count) for modality, count in vectors.items()]
        middle = [torch.full((1, count), int(ids[0, 0]) if token is None else token) for token, count in tokens]
        zeros = torch.zeros_like(ids)
        kinds = torch.cat([zeros[:, :half], *types, zeros[:, half:]], dim=1)
        place = torch.arange(kinds.shape[1])
        tiles = self.find_size(("max_num_tiles",), 1, "vision")
        return {
            "input_ids": torch.cat([ids[:, :half], *middle, ids[:, half:]], dim=1),
            "mm_token_type_ids": kinds,
            "image_embeds_position_mask": kinds == 1,
            "global_attention_mask": (place == 0).long()[None],
            "cross_attention_mask": torch.ones(1, len(place), 1, tiles, dtype=torch.long),
            "bbox": torch.stack([place, place, place + 1, place + 1], dim=-1)[None],
            "decoder_input_ids": ids.flip(1),
            "qformer_input_ids": ids,
            "classes_input_ids": ids,
            "classes_attention_mask": torch.ones_like(ids),
            "tasks_input_ids": ids,
            "tasks_attention_mask": torch.ones_like(ids),
        }

    def _random_ids(self, config: PreTrainedConfig, length: int) -> torch.Tensor:
        """Ordinary tokens, with the end token at the end, where classification heads look for it."""
        tables = (m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding))
        size = getattr(config, "vocab_size", None) or self.find_size(("vocab_size",), next(tables, 256))
        special = {token for _, part in walk_configs(self.model.config) for token in _special_ids(part)}
        ordinary = torch.tensor([token for token in range(size) if token not in special] or list(range(size)))
        ids = ordinary[torch.randint(len(ordinary), (1, length), generator=torch.Generator().manual_seed(SEED))]
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < size:
            ids[:, -1] = end
        return ids

    def _others(self) -> Inputs:
        """What belongs to no modality."""
        others = make_series(self)
        for name, shape in _SHAPES.items():
            sizes = [size if isinstance(size, int) else self.find_size((size,), 0) for size in shape]
            if all(sizes) and (name in self.required or name not in _STAND_INS):
                others[name] = make_noise(*sizes)
        others["task_inputs"] = torch.ones(1, self.find_size(("task_seq_len",), LENGTH), dtype=torch.long)
        others["timesteps"] = torch.arange(LENGTH)[None]
        others["lang_ids"] = torch.zeros(1, dtype=torch.long)
        others["classes_structure"] = torch.ones(1, dtype=torch.long)
        others["entity_ids"] = torch.ones(1, 2, dtype=torch.long)
        others["entity_position_ids"] = torch.arange(2).view(1, 2, 1)
        if "input_points" not in self.names and is_torchvision_available():  # which cuts out what is in the boxes
            others["input_boxes"] = torch.full((1, 1, 4), 0.5)
            others["input_boxes_labels"] = torch.ones(1, 1, dtype=torch.long)
        return others


def _special_ids(config: PreTrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "token_ids")):
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(number, int):
                    yield number


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
