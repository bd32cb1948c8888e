"""Pixels, sound and time series of the shapes that a model's config and modules tell, for the inputs of a model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

SEED = 0
Inputs = dict[str, torch.Tensor]

_IMAGE_SIZES = ("image_size", "img_size", "input_size", "pretrain_image_size", "max_img_size")
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
_TOKENS = {"input_ids", "decoder_input_ids"}
_SIDE = 128  # of an image, in pixels, where the config does not say it
_MEL_FRAMES = 128
_SAMPLES = 19200


class Taker:
    """A model, the arguments that its forward pass takes, and those of them that it cannot do without."""

    def __init__(self, model: PreTrainedModel) -> None:
        """See the class."""
        parameters = name_parameters(model.forward)
        self.model = model
        self.names = parameters.keys()
        self.required = [name for name, is_required in parameters.items() if is_required]

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

    def find_features(self, modality: str) -> Callable[..., Any] | None:
        """Find the method that makes features of a modality, the outermost that does not just hand on `**kwargs`."""
        methods = (getattr(module, f"get_{modality}_features", None) for module in self.model.modules())
        return next((method for method in methods if method is not None and name_parameters(method)), None)

    def find_tower(self, name: str) -> nn.Module | None:
        """Find the outermost module that takes an argument of a name, and no text with it."""
        for module in self.model.modules():
            names = name_parameters(module.forward).keys()
            if name in names and not _TOKENS & names:
                return module
        return None

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


def name_parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """The names of a function's parameters, each with whether it cannot do without."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


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
    patches = _make_patches(taker, "image", ("pixel_values", "hidden_states", "patch_embeds"))
    if patches:
        return patches
    get_features = taker.find_features("image")
    features = {} if get_features is None else name_parameters(get_features)
    is_tiled = "pixel_attention_mask" in {*taker.names, *features}
    height, width = _image_size(taker)
    points = taker.find(("image_grid_pinpoints",))  # sizes of whole images, which are cut into tiles
    size = min(points, key=math.prod) if points else (height, width)
    tiles = 1 + math.ceil(size[0] / height) * math.ceil(size[1] / width) if points else 1
    frames, several = taker.find_size(_FRAMES, 0, "vision"), taker.find_size(("max_num_tiles",), 1, "vision")
    leading: tuple[int, ...] = (1,)
    if "aspect_ratio_ids" in taker.names:
        leading = (1, 1, several)
    elif frames and "pixel_values_videos" not in taker.names:
        leading = (1, frames)
    elif points or is_tiled or taker.find(("cross_layer_interval",)):
        leading = (1, tiles)
    image = _pixels((*leading, taker.find_size(_CHANNELS, 3, "vision"), height, width))
    image["high_res_pixel_values"] = _pixels((1, 3, *_image_size(taker, "high_res")))["image"]
    image["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
    image["aspect_ratio_mask"] = torch.ones(1, 1, several, dtype=torch.long)
    if "image_sizes" in taker.required or features.get("image_sizes") or points:
        image["image_sizes"] = torch.tensor([size])
    if is_tiled:
        masks = [torch.ones(1, tiles, *shape, dtype=torch.bool) for shape in ((height, width), ())]
        return [{**image, "pixel_attention_mask": mask} for mask in masks]
    weight = _patch_weight(taker.model)
    return [image] if weight is None or weight.dim() > 2 else [image, _pixels((16, weight.shape[1]))]


def make_videos(taker: Taker) -> list[Inputs]:
    """One video, for a model that has no other input for its vision tower; see `make_images`."""
    separate = any("video" in name for name, _ in taker.model.named_modules())
    needed = "pixel_values" not in taker.names or "pixel_values_videos" in taker.required or separate
    if "pixel_values_videos" not in taker.names or not needed or taker.lacks("vision"):
        return []
    channels, frames = taker.find_size(_CHANNELS, 3, "vi"), taker.find_size(_FRAMES, 2, "vi")
    whole = {"pixel_values_videos": make_noise(1, frames, channels, *_image_size(taker))}
    return _make_patches(taker, "video", ("pixel_values_videos",)) or [whole]


def make_features(taker: Taker) -> list[Inputs]:
    """One sound as a spectrogram, or as vectors for an encoder that takes those; see `make_images`."""
    names = [name for name in ("input_features", "audio_mel") if name in taker.names]
    if not names or taker.lacks("audio"):
        return []
    if any((taker.find(_MEL_BINS, "audio"), taker.find_tower(names[0]), taker.find_features("audio"))):
        return _make_spectrograms(taker, names[0])
    hidden = taker.find_size(("hidden_size", "d_model"), 1)
    return [] if "input_values" in taker.names else [{names[0]: make_noise(1, 16, hidden)}]


def make_waves(taker: Taker) -> list[Inputs]:
    """One sound as a wave, or as a spectrogram of that name; see `make_images`."""
    if "input_values" not in taker.names or taker.lacks("audio"):
        return []
    convolutions = [module for module in taker.model.modules() if isinstance(module, nn.Conv1d)]
    if taker.find(_MEL_BINS, "audio") and not any(module.in_channels == 1 for module in convolutions):
        return _make_spectrograms(taker, "input_values")
    mask, ends = torch.ones(1, _SAMPLES, dtype=torch.long), torch.tensor([[_SAMPLES]])
    shapes = ((1, _SAMPLES), (1, 1, _SAMPLES))
    return [{"input_values": make_noise(*s), "padding_mask": mask, "input_values_cutoffs": ends} for s in shapes]


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
    if columns is None and taker.find_size(("input_size",), 1) > 1:
        columns = taker.find(("input_size",))
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


def _image_size(taker: Taker, word: str = "vision") -> tuple[int, int]:
    size = taker.find(_IMAGE_SIZES, word) or _SIDE
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def _make_patches(taker: Taker, modality: str, names: tuple[str, ...]) -> list[Inputs]:
    """An image cut into patches, for models that take a grid with them; nothing for others."""
    weight = _patch_weight(taker.model)
    if weight is None:
        return []
    merge = taker.find_size(_MERGES, 2, "vision")
    side = 2 * max(merge, 2)
    grid = torch.tensor([[1, side, side]])
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), dim=-1).view(1, -1, 2)
    flat = make_noise(side**2, weight[0].numel())
    grids = {
        "grid_thw": grid,
        f"{modality}_grid_thw": grid,
        "spatial_shapes": grid[:, 1:],
        "target_sizes": grid[:, 1:],
        "image_position_ids": places,
        "pixel_position_ids": places,
        "flattened_patches": torch.cat([places + 1, flat[None]], dim=-1),
    }
    if not grids.keys() & taker.names:
        return []
    common = {
        f"{modality}_merge_sizes": torch.tensor([merge]),
        "merge_sizes": torch.tensor([merge]),
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.long),
    }
    forms = [flat[None] if "pixel_attention_mask" in taker.names else flat]
    if weight.dim() == 4:
        forms.append(flat.view(-1, *weight.shape[1:]))
    return [{**dict.fromkeys(names, pixels), **grids, **common} for pixels in forms]


def _patch_weight(model: nn.Module) -> torch.Tensor | None:
    """The weight that turns patches into vectors."""
    for word in ("patch", "vis"):
        for name, module in model.named_modules():
            if word in name and isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                return module.weight
    return None


def _make_spectrograms(taker: Taker, name: str) -> list[Inputs]:
    """A spectrogram in each layout that there is: nothing in a model says which is its own."""
    bins = taker.find_size(_MEL_BINS, 80, "audio")
    frames = _count_frames(taker)
    mask = torch.ones(1, frames, dtype=torch.long)
    common = {
        "input_features_mask": mask,
        "feature_attention_mask": mask,
        "audio_mel_mask": mask == 0,
        "padding_mask": torch.ones(1, 160 * frames, dtype=torch.long),
        "is_longer": torch.zeros(1, 1, dtype=torch.bool),
    }
    shapes = (1, bins, frames), (1, frames, bins), (1, 1, frames, bins)
    return [{name: make_noise(*shape), **common} for shape in shapes]


def _count_frames(taker: Taker) -> int:
    """As many as a model with a table of positions takes, after two convolutions of which one halves them."""
    positions = taker.find_size(("max_source_positions",), 0, "audio")
    tables = [module.num_embeddings for module in taker.model.modules() if isinstance(module, nn.Embedding)]
    if positions in tables:
        return 2 * positions
    return taker.find_size(("max_length",), 4 * taker.find_size(("n_window",), _MEL_FRAMES // 4, "audio"), "audio")
