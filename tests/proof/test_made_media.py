"""What a model's config, modules and signatures tell of its inputs."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_slim.proof.made_media import (
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


class Tower(nn.Module):
    """A vision tower."""

    def __init__(self, patch):
        super().__init__()
        self.patch_embedding = patch

    def forward(self, pixel_values):
        return pixel_values


def taker(forward, patch=None, parts=(), **fields) -> Taker:
    """A model with a forward pass of some signature, a config with some fields, and a tower or other parts."""
    model = nn.Module()
    model.config = PreTrainedConfig()
    for name, value in fields.items():
        setattr(model.config, name, value)
    if patch is not None:
        model.vision_tower = Tower(patch)
    for number, part in enumerate(parts):
        model.add_module(f"part{number}", part)
    model.forward = forward
    return Taker(model)


def shapes(variants):
    return [{name: tuple(value.shape) for name, value in variant.items()} for variant in variants]


def test_fields_are_looked_up_in_configs_whose_key_fits_first():
    inner = PreTrainedConfig(width=2, deep=PreTrainedConfig(width=[4, 5]))
    found = taker(lambda x: x, width=1, vision_config=inner)
    assert [path for path, _ in walk_configs(found.model.config)] == ["", ".vision_config", ".vision_config.deep"]
    assert found.find(("width",)) == 1
    assert found.find(("width",), "vision") == 2
    assert found.find_size(("width",), 9, "deep") == 4
    assert (found.find(("height",)), found.find_size(("height",), 9)) == (None, 9)


def test_a_tower_that_the_config_leaves_out_is_lacking():
    found = taker(lambda x: x, audio_config=None, vision_config=PreTrainedConfig())
    assert (found.lacks("audio"), found.lacks("vision"), found.lacks("speech")) == (True, False, False)


def test_parameters_are_named_with_what_is_required():
    def forward(x, y=1, *args, z, **kwargs):
        pass

    assert name_parameters(forward) == {"x": True, "y": False, "z": True}
    found = taker(forward)
    assert list(found.names) == ["x", "y", "z"] and found.required == ["x", "z"]


def test_the_tower_is_the_outermost_module_that_takes_no_text():
    found = taker(lambda input_ids, pixel_values: None, nn.Conv2d(3, 8, 4))
    assert found.find_tower("pixel_values") is found.model.vision_tower
    assert found.find_tower("input_values") is None
    alone = taker(lambda pixel_values: None, nn.Conv2d(3, 8, 4))
    assert alone.find_tower("pixel_values") is alone.model


def test_features_come_from_the_method_that_names_what_it_takes():
    found = taker(lambda input_ids: None, nn.Conv2d(3, 8, 4))
    found.model.get_image_features = lambda *args, **kwargs: None
    assert found.find_features("image") is None
    found.model.vision_tower.get_image_features = lambda pixel_values: None
    assert found.find_features("image") is found.model.vision_tower.get_image_features


IMAGE = ("pixel_values", "image", "prompt_pixel_values", "prompt_masks")


@pytest.mark.parametrize(
    ("forward", "fields", "expected"),
    [
        (lambda pixel_values: None, {}, [(1, 3, 128, 128)]),
        (lambda pixel_values: None, {"image_size": 24, "num_channels": 1}, [(1, 1, 24, 24)]),
        (lambda pixel_values: None, {"image_size": (24, 32)}, [(1, 3, 24, 32)]),
        (lambda pixel_values: None, {"image_size": {"height": 8, "width": 16}}, [(1, 3, 8, 16)]),
        (lambda pixel_values: None, {"image_size": 8, "num_frames": 5}, [(1, 5, 3, 8, 8)]),
        (lambda pixel_values, image_sizes=None: None, {"image_size": 8}, [(1, 3, 8, 8)]),
        (lambda pixel_values: None, {"image_size": 8, "image_grid_pinpoints": [[16, 24]]}, [(1, 7, 3, 8, 8)]),
        (lambda pixel_values: None, {"image_size": 8, "cross_layer_interval": 1}, [(1, 1, 3, 8, 8)]),
        (lambda pixel_values, pixel_attention_mask: None, {"image_size": 8}, [(1, 1, 3, 8, 8)] * 2),
        (lambda pixel_values, aspect_ratio_ids: None, {"image_size": 8, "max_num_tiles": 4}, [(1, 1, 4, 3, 8, 8)]),
        (lambda input_ids: None, {}, []),
        (lambda pixel_values: None, {"vision_config": None}, []),
    ],
)
def test_an_image_has_the_shape_that_config_and_signature_tell(forward, fields, expected):
    variants = make_images(taker(forward, nn.Conv2d(3, 8, 4), **fields))
    assert [tuple(variant["pixel_values"].shape) for variant in variants] == expected
    assert all(set(IMAGE) <= variant.keys() for variant in variants)


def test_sizes_of_images_go_along_where_they_are_needed():
    (image,) = make_images(taker(lambda pixel_values, image_sizes: None, image_size=8))
    assert image["image_sizes"].tolist() == [[8, 8]]
    (image,) = make_images(taker(lambda pixel_values, image_sizes=None: None, image_size=8))
    assert "image_sizes" not in image


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        (nn.Conv3d(3, 8, (2, 4, 4)), [(16, 96)]),
        (nn.Linear(48, 8), [(16, 48)]),
        (nn.Conv2d(3, 8, 4), [(16, 48), (16, 3, 4, 4)]),
    ],
)
def test_patches_have_the_shape_of_the_weight_that_takes_them(patch, expected):
    variants = make_images(taker(lambda pixel_values, image_grid_thw: None, patch))
    assert [tuple(variant["pixel_values"].shape) for variant in variants] == expected
    assert variants[0]["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_patches_with_a_mask_come_in_batches():
    variants = make_images(taker(lambda pixel_values, spatial_shapes, pixel_attention_mask: None, nn.Linear(48, 8)))
    assert [variant["pixel_values"].shape for variant in variants] == [(1, 16, 48)]
    assert variants[0]["pixel_attention_mask"].shape == (1, 16)


def test_a_linear_layer_of_patches_may_take_an_image_or_its_patches():
    variants = make_images(taker(lambda pixel_values: None, nn.Linear(48, 8), image_size=8))
    assert [variant["pixel_values"].shape for variant in variants] == [(1, 3, 8, 8), (16, 48)]


def test_a_video_is_made_where_there_is_no_image():
    assert shapes(make_videos(taker(lambda pixel_values_videos: None, image_size=8, num_frames=5))) == [
        {"pixel_values_videos": (1, 5, 3, 8, 8)}
    ]
    assert make_videos(taker(lambda pixel_values, pixel_values_videos=None: None)) == []


@pytest.mark.parametrize(
    ("fields", "parts", "frames"),
    [
        ({}, [], 128),
        ({"n_window": 50}, [], 200),
        ({"max_length": 70}, [], 70),
        ({"max_source_positions": 30}, [nn.Embedding(30, 4)], 60),
        ({"max_source_positions": 30}, [nn.Embedding(31, 4)], 128),
    ],
)
def test_a_spectrogram_has_as_many_frames_as_the_positions_say(fields, parts, frames):
    variants = make_features(taker(lambda input_features: None, parts=parts, num_mel_bins=20, **fields))
    assert [tuple(variant["input_features"].shape) for variant in variants] == [
        (1, 20, frames),
        (1, frames, 20),
        (1, 1, frames, 20),
    ]
    assert variants[0]["input_features_mask"].shape == (1, frames)


def test_features_without_bins_are_vectors():
    variants = make_features(taker(lambda input_features, input_ids: None, d_model=24))
    assert shapes(variants) == [{"input_features": (1, 16, 24)}]


def test_a_wave_has_one_or_no_channel():
    variants = make_waves(taker(lambda input_values: None, parts=[nn.Conv1d(1, 4, 3)], num_mel_bins=20))
    assert [tuple(variant["input_values"].shape) for variant in variants] == [(1, 19200), (1, 1, 19200)]
    variants = make_waves(taker(lambda input_values: None, parts=[nn.Conv2d(1, 4, 3)], num_mel_bins=20))
    assert [tuple(variant["input_values"].shape) for variant in variants][:2] == [(1, 20, 128), (1, 128, 20)]


def test_a_series_has_its_history_and_its_features():
    fields = {"context_length": 8, "lags_sequence": [1, 4], "num_time_features": 2, "prediction_length": 3}

    def forward(past_values, past_observed_mask):
        pass

    series = make_series(taker(forward, **fields, input_size=5, num_static_real_features=6))
    assert shapes([series]) == [
        {
            "past_values": (1, 12, 5),
            "past_time_features": (1, 12, 2),
            "past_values_padding": (1, 12),
            "freq": (1, 1),
            "static_real_features": (1, 6),
            "past_observed_mask": (1, 12, 5),
            "future_values": (1, 3, 5),
            "future_time_features": (1, 3, 2),
        }
    ]
    assert make_series(taker(lambda input_ids: None)) == {}


def test_noise_is_the_same_every_time():
    assert torch.equal(make_noise(2, 3), make_noise(2, 3))
    assert make_noise(1000).std() == pytest.approx(1, abs=0.1)
