"""Pixels, sound and time series of the shapes that a model's config and modules tell, for the inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SEED = 0
Inputs = dict[str, torch.Tensor]

_IMAGE_SIZES = ("image_size", "img_size", "input_size", "pretrain_image_size")
_CHANNELS = ("num_channels", "in_channels", "in_chans")
_FRAMES = ("num_frames", "frames_per_clip")
_MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "window_kernel_size")
_MEL_BINS = (
    "feature_projection_input_dim",
    "input_dim",
    "num_mel_bins",
    "n_mel_bins",
    "input_feat_per_channel",
    "input_feat_size",
    "feature_size",
)
_PIXELS = ("pixel_values", "hidden_states", "patch_embeds", "flattened_patches", "image")
_GRIDS = (
    "image_grid_thw",
    "grid_thw",
    "spatial_shapes",
    "target_sizes",
    "image_position_ids",
    "pixel_position_ids",
    "flattened_patches",
)
_IMAGE_SIDES = (64, 128, 256)
_SAMPLES = (4800, 19200)
_MEL_FRAMES = (128, 200)


@dataclass(frozen=True)
class Taker:
    """A model, the arguments that its forward pass takes, and those of them that it cannot do without."""

    model: PreTrainedModel
    names: frozenset[str]
    required: tuple[str, ...]

    def find(self, fields: Sequence[str], word: str = "") -> Any:
        """Look up a field of the config.

        Args:
            fields: Its possible names.
            word: Look first into the configs inside the config whose key holds this word.

        Returns:
            The first value that is there, or None.
        """
        parts = sorted(walk_configs(self.model.config), key=lambda item: not word or word not in item[0])
        found = (getattr(part, field, None) for _, part in parts for field in fields)
        return next((value for value in found if value is not None), None)

    def find_size(self, fields: Sequence[str], default: int, word: str = "") -> int:
        """Look up a positive number, or the first of a list of them; else the default."""
        value = self.find(fields, word)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) and value > 0 else default

    def lacks(self, tower: str) -> bool:
        """Whether the config says that this model comes without a tower that its class has."""
        key = f"{tower}_config"
        return key in vars(self.model.config) and getattr(self.model.config, key) is None


def walk_configs(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and those inside it, with the keys that lead there."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from walk_configs(value, f"{path}.{name}")


def make_noise(*shape: int) -> torch.Tensor:
    """Normally distributed numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def make_images(taker: Taker) -> list[Inputs]:
    """One image.

    Args:
        taker: The model.

    Returns:
        The forms that its pixels may have, likeliest first, each with what goes with the pixels; empty for a model
        that takes none.
    """
    if not set(_PIXELS) & taker.names or taker.lacks("vision"):
        return []
    channels = taker.find_size(_CHANNELS, 3, "vision")
    frames = taker.find_size(_FRAMES, 2, "vision")
    variants = _make_patches(taker, "image", ("pixel_values", "hidden_states", "patch_embeds"))
    high = _image_sizes(taker, "high_res")[0]
    for height, width in _image_sizes(taker):
        size, tiles = _tile(taker, height, width)
        one, many = (1, channels, height, width), (1, tiles, channels, height, width)
        masks = [torch.ones(1, tiles, *shape, dtype=torch.bool) for shape in ((height, width), ())]
        several = taker.find_size(("max_num_tiles",), 1, "vision")
        variants += [
            {**_pixels(one), "high_res_pixel_values": make_noise(1, channels, *high)},
            {**_pixels(one), "image_sizes": size},
            *({**_pixels(many), "image_sizes": size, "pixel_attention_mask": mask} for mask in masks),
            _pixels((1, frames, channels, height, width)),
            {
                **_pixels((1, 1, several, channels, height, width)),
                "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(1, 1, several, dtype=torch.long),
            },
        ]
    weight = _patch_weight(taker.model)
    if weight is not None and weight.dim() == 2:
        variants += [_pixels((16, weight.shape[1])), _pixels((1, 16, weight.shape[1]))]
    return variants


def make_videos(taker: Taker) -> list[Inputs]:
    """One video, for a model that has no other input for its vision tower; see `make_images`."""
    separate = any("video" in name for name, _ in taker.model.named_modules())
    needed = "pixel_values" not in taker.names or "pixel_values_videos" in taker.required or separate
    if "pixel_values_videos" not in taker.names or not needed or taker.lacks("vision"):
        return []
    channels, frames = taker.find_size(_CHANNELS, 3, "vi"), taker.find_size(_FRAMES, 2, "vi")
    whole = [{"pixel_values_videos": make_noise(1, frames, channels, *size)} for size in _image_sizes(taker)]
    return [*_make_patches(taker, "video", ("pixel_values_videos",)), *whole]


def make_audio(taker: Taker) -> list[Inputs]:
    """One sound, as a spectrogram or as a wave; see `make_images`."""
    if taker.lacks("audio"):
        return []
    names = [name for name in ("input_features", "audio_mel") if name in taker.names]
    variants = [variant for name in names for variant in _make_spectrograms(taker, name)]
    hidden = taker.find_size(("hidden_size", "d_model"), 1)
    variants += [{name: make_noise(1, 16, hidden)} for name in names]
    if "input_values" not in taker.names:
        return variants
    values = list(_make_spectrograms(taker, "input_values")) if taker.find(_MEL_BINS, "audio") else []
    for samples in _SAMPLES:
        mask = torch.ones(1, samples, dtype=torch.long)
        for shape in ((1,), (1, 1)):
            wave = {"input_values": make_noise(*shape, samples)}
            values += [wave, {**wave, "padding_mask": mask, "input_values_cutoffs": torch.tensor([[samples]])}]
    values.append({"input_values": make_noise(1, 16, hidden)})
    if "input_values" in taker.required:
        return [{**features, **value} for features in variants or [{}] for value in values]
    return [*variants, *values]


def make_series(taker: Taker) -> Inputs:
    """A time series, and its future where the decoder is fed with it."""
    if "past_values" not in taker.names:
        return {}
    history = taker.find_size(("context_length",), 16) + max(taker.find(("lags_sequence",)) or [0])
    future = taker.find_size(("prediction_length", "horizon_length"), 1)
    features, real, categories = (
        taker.find((f"num_{kind}_features",)) or 0 for kind in ("time", "static_real", "static_categorical")
    )
    columns = taker.find(("num_input_channels",))
    columns = (
        columns if columns is not None or taker.find_size(("input_size",), 1) == 1 else taker.find(("input_size",))
    )
    shape = (history,) if columns is None else (history, columns)
    series = {
        "past_values": make_noise(1, *shape),
        "past_time_features": make_noise(1, history, features),
        "past_values_padding": torch.zeros(1, history, dtype=torch.long),
        "freq": torch.zeros(1, 1, dtype=torch.long),
    }
    if real:
        series["static_real_features"] = make_noise(1, real)
    if categories:
        series["static_categorical_features"] = torch.zeros(1, categories, dtype=torch.long)
    if "past_observed_mask" in taker.required:
        series["past_observed_mask"] = torch.ones(1, *shape)
        series["future_values"] = make_noise(1, future, *shape[1:])
        series["future_time_features"] = make_noise(1, future, features)
    return series


def _pixels(shape: tuple[int, ...]) -> Inputs:
    return dict.fromkeys(("pixel_values", "image", "prompt_pixel_values", "prompt_masks"), make_noise(*shape))


def _image_sizes(taker: Taker, word: str = "vision") -> list[tuple[int, int]]:
    size = taker.find(_IMAGE_SIZES, word)
    if isinstance(size, int):
        return [(size, size)]
    if isinstance(size, dict):
        return [(size["height"], size["width"])]
    return [(size[0], size[-1])] if size else [(side, side) for side in _IMAGE_SIDES]


def _tile(taker: Taker, height: int, width: int) -> tuple[torch.Tensor, int]:
    """The size of a whole image, and the number of tiles that it is cut into where tiles have this size."""
    points = taker.find(("image_grid_pinpoints",))
    if not points:
        return torch.tensor([[height, width]]), 1
    size = min(points, key=math.prod)
    return torch.tensor([size]), 1 + math.ceil(size[0] / height) * math.ceil(size[1] / width)


def _make_patches(taker: Taker, modality: str, names: tuple[str, ...]) -> list[Inputs]:
    """Images cut into patches, for models that take a grid with them."""
    weight = _patch_weight(taker.model)
    if weight is None or not {*_GRIDS, f"{modality}_grid_thw"} & taker.names:
        return []
    merge = taker.find_size(_MERGES, 2, "vision")
    side = 2 * max(merge, 2)
    grid = torch.tensor([[1, side, side]])
    axis = torch.arange(side)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(1, -1, 2)
    flat = make_noise(1, side**2, weight[0].numel())
    common = {
        "grid_thw": grid,
        f"{modality}_grid_thw": grid,
        f"{modality}_merge_sizes": torch.tensor([merge]),
        "merge_sizes": torch.tensor([merge]),
        "spatial_shapes": grid[:, 1:],
        "target_sizes": grid[:, 1:],
        "image_position_ids": places,
        "pixel_position_ids": places,
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.long),
        "flattened_patches": torch.cat([places + 1, flat], dim=-1),
    }
    shapes: list[tuple[int, ...]] = [(side**2, weight[0].numel()), (1, side**2, weight[0].numel())]
    if weight.dim() > 2:
        channels, *size = weight.shape[1:]
        shapes += [(side**2, channels, *size), (1, channels, size[-1], side**2 * size[-1])]
    return [{**common, **dict.fromkeys(names, make_noise(*shape))} for shape in shapes]


def _patch_weight(model: nn.Module) -> torch.Tensor | None:
    """The weight that turns patches into vectors."""
    for word in ("patch", "vis"):
        for name, module in model.named_modules():
            if word in name and isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                return module.weight
    return None


def _make_spectrograms(taker: Taker, name: str) -> Iterator[Inputs]:
    positions = taker.find_size(("max_source_positions", "max_length"), 0, "audio")
    window = taker.find_size(("n_window",), 0, "audio")
    bins = taker.find_size(_MEL_BINS, 0, "audio")
    for size in [bins] if bins else (80, 128):
        for frames in filter(None, (*_MEL_FRAMES, 2 * window, 2 * positions, positions)):
            mask = torch.ones(1, frames, dtype=torch.long)
            masks = {"input_features_mask": mask, "feature_attention_mask": mask, "audio_mel_mask": mask == 0}
            samples = torch.ones(1, 160 * frames, dtype=torch.long)
            for shape in ((1, size, frames), (1, frames, size), (1, 1, frames, size)):
                features = {name: make_noise(*shape)}
                yield {**features, "is_longer": torch.zeros(1, 1, dtype=torch.bool)}
                yield {**features, **masks, "padding_mask": samples}
