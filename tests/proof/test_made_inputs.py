"""Inputs made for text, vision, audio, time-series and multimodal models, and their refusal."""

import pytest
import torch
import transformers
from conftest import STACK, TEXT, build
from transformers import PreTrainedModel

from hf_slim.proof.made_inputs import describe, evaluating, make_inputs

TWO = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
TWO = {**TWO, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2}
IMAGE = {**STACK, "image_size": 16, "patch_size": 4, "projection_dim": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPEECH = {**STACK, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
SAM = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}

CASES = {
    "bert": (
        "BertForMaskedLM",
        transformers.BertConfig(**TEXT, **STACK),
        "input_ids (1, 16)",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config(**TEXT, d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=64),
        "decoder_input_ids (1, 16), input_ids (1, 16)",
    ),
    "vit": (
        "ViTModel",
        transformers.ViTConfig(**STACK, image_size=(16, 24), patch_size=4, num_channels=1),
        "pixel_values (1, 1, 16, 24)",
    ),
    "clip": (
        "CLIPModel",
        transformers.CLIPConfig(text_config={**TEXT, **STACK}, vision_config=IMAGE, projection_dim=32),
        "input_ids (1, 16), pixel_values (1, 3, 16, 16)",
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        transformers.Wav2Vec2Config(**TEXT, **SPEECH, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4),
        "input_values (1, 19200)",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        transformers.WhisperConfig(**TEXT, **TWO, num_mel_bins=20, max_source_positions=30),
        "decoder_input_ids (1, 16), input_features (1, 20, 60)",
    ),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        transformers.Speech2TextConfig(**TEXT, **TWO, input_feat_per_channel=20, conv_channels=32),
        "decoder_input_ids (1, 16), input_features (1, 128, 20)",
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**IMAGE),
            text_config=transformers.LlamaConfig(**TEXT, **STACK),
            image_token_index=98,
        ),
        "input_ids (1, 32), pixel_values (1, 3, 16, 16)",
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        transformers.Qwen2VLConfig(
            text_config={**TEXT, **STACK, "num_key_value_heads": 2, "rope_parameters": ROPE},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
            image_token_id=97,
            video_token_id=98,
        ),
        "image_grid_thw (1, 3), input_ids (1, 20), mm_token_type_ids (1, 20), pixel_values (16, 96)",
    ),
    "layoutlm": (
        "LayoutLMModel",
        transformers.LayoutLMConfig(**TEXT, **STACK, max_2d_position_embeddings=64),
        "bbox (1, 16, 4), input_ids (1, 16)",
    ),
    "time_series_transformer": (
        "TimeSeriesTransformerForPrediction",
        transformers.TimeSeriesTransformerConfig(
            prediction_length=3, context_length=8, lags_sequence=[1, 4], num_time_features=2, **TWO
        ),
        "future_time_features (1, 3, 2), future_values (1, 3), past_observed_mask (1, 12), "
        "past_time_features (1, 12, 2), past_values (1, 12)",
    ),
    "sam": (
        "SamModel",
        transformers.SamConfig(
            vision_config={
                **SAM,
                "output_channels": 16,
                "num_pos_feats": 8,
                "num_hidden_layers": 1,
                "mlp_dim": 48,
                "window_size": 4,
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8},
            mask_decoder_config={"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
        ),
        "input_points (1, 1, 1, 2), pixel_values (1, 3, 64, 64)",
    ),
    "idefics3": (
        "Idefics3Model",
        transformers.Idefics3Config(
            vision_config={**STACK, "image_size": 16, "patch_size": 4},
            text_config={**TEXT, **STACK, "model_type": "llama"},
            image_token_id=98,
            scale_factor=2,
        ),
        "input_ids (1, 20), pixel_attention_mask (1, 1, 16, 16), pixel_values (1, 1, 3, 16, 16)",
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        transformers.Qwen2AudioConfig(
            audio_config={**TWO, "num_mel_bins": 20, "max_source_positions": 30},
            text_config={**TEXT, **STACK, "model_type": "qwen2", "num_key_value_heads": 2},
            audio_token_index=98,
        ),
        "attention_mask (1, 17), feature_attention_mask (1, 60), input_features (1, 20, 60), input_ids (1, 17)",
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[PreTrainedModel, str]:
    """A tiny model of every kind in turn, with what is made for it."""
    model_class, config, expected = CASES[request.param]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).train(), expected


def test_the_shapes_are_those_that_the_config_tells(case):
    model, expected = case
    inputs = make_inputs(model)
    assert describe(dict(sorted(inputs.items()))) == expected
    assert model.training


def test_the_inputs_are_the_same_every_time(case):
    model, _ = case
    first, state = make_inputs(model), torch.get_rng_state()
    again = make_inputs(model)
    assert all(torch.equal(first[name], again[name]) for name in {*first, *again})
    assert torch.equal(state, torch.get_rng_state())


def test_every_tower_takes_part(case):
    model, _ = case
    inputs = make_inputs(model)
    reached = set()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: reached.add(name))
    with evaluating(model):
        model(**inputs)
    assert {name for name in set(layers) - reached if not name.endswith("out_proj")} == set()


def test_numbers_have_the_dtype_of_the_model():
    model = transformers.CLIPModel(CASES["clip"][1]).to(torch.bfloat16)
    assert {name: value.dtype for name, value in make_inputs(model).items()} == {
        "input_ids": torch.int64,
        "pixel_values": torch.bfloat16,
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inputs_lie_on_the_device_of_the_model(case):
    model, _ = case
    assert {value.device.type for value in make_inputs(model.cuda()).values()} == {"cuda"}


def test_text_ends_with_the_end_token_and_holds_no_other_special_one():
    ids = make_inputs(transformers.BertModel(CASES["bert"][1]))["input_ids"][0].tolist()
    assert ids[-1] == TEXT["eos_token_id"] and not {0, 1, 2} & set(ids[:-1])


def test_placeholders_are_as_many_as_the_vectors_of_the_image():
    ids = make_inputs(transformers.LlavaForConditionalGeneration(CASES["llava"][1]))["input_ids"][0]
    assert (ids == 98).nonzero().flatten().tolist() == list(range(8, 24))


def test_text_is_no_longer_than_half_of_the_positions():
    model = transformers.RobertaModel(transformers.RobertaConfig(**TEXT, **STACK, max_position_embeddings=10))
    assert make_inputs(model)["input_ids"].shape == (1, 5)


class Unusual(transformers.BertModel):
    """A model with an argument that no rule knows."""

    def forward(self, input_ids, weather):
        return super().forward(input_ids * weather)


class Picky(transformers.BertModel):
    """A model that takes nothing."""

    def forward(self, input_ids):
        raise IndexError("too long")


class Blind(transformers.LlavaForConditionalGeneration):
    """A model with a tower for images that takes no image."""

    def get_image_features(self, pixel_values):
        raise ValueError("too dark")


@pytest.mark.parametrize(
    ("model_class", "case", "message"),
    [
        (Unusual, "bert", r"Unusual takes weather, for which no input .* verify={'weather': ...}, or verify=False"),
        (Picky, "bert", r"Picky cannot run on any input .* on input_ids \(1, 16\): too long Pass .* verify={...}"),
        (Blind, "llava", r"Blind takes no image .* on pixel_values \(1, 3, 16, 16\): too dark Pass .* verify={...}"),
    ],
)
def test_other_inputs_are_asked_for(model_class, case, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(model_class(CASES[case][1]))


@pytest.mark.parametrize(("positions", "tokens"), [(512, 128), (100, 50)])
def test_a_longer_text_is_made_where_it_fits(positions, tokens):
    model = build("bert", max_position_embeddings=positions)
    assert make_inputs(model, 128)["input_ids"].shape == (1, tokens)
    assert make_inputs(model)["input_ids"].shape == (1, 16)
