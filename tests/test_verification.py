"""Made inputs and the comparison."""

import pytest
import torch
import transformers
from conftest import STACK, TEXT, build

from hf_slim.verification import VerificationError, compare_outputs, compute_outputs, make_inputs


def test_every_family_runs_on_made_inputs(family):
    model = build(family).train()
    inputs = make_inputs(model)
    outputs = compute_outputs(model, inputs)
    assert "logits" in outputs and model.training
    assert all(torch.equal(value, make_inputs(model)[key]) for key, value in inputs.items())


@pytest.mark.parametrize(
    ("model_class", "config_class", "fields"),
    [
        (
            "BartForSequenceClassification",
            "BartConfig",
            {**TEXT, "d_model": 32, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8},
        ),
        ("GPT2ForSequenceClassification", "GPT2Config", {**TEXT, "n_embd": 48, "n_layer": 1, "pad_token_id": None}),
        ("RobertaForTokenClassification", "RobertaConfig", {**TEXT, **STACK, "max_position_embeddings": 10}),
    ],
)
def test_heads_with_demands_run_too(model_class, config_class, fields):
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    assert compute_outputs(model, make_inputs(model))["logits"].isfinite().all()


def test_other_inputs_are_asked_for():
    config = transformers.Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="Wav2Vec2Model takes input_values, .* verify={'input_values': ...}"):
        make_inputs(transformers.Wav2Vec2Model(config))


def test_a_model_that_cannot_run_is_named():
    model = transformers.BertForMultipleChoice(build("bert").config)
    with pytest.raises(ValueError, match=r"BertForMultipleChoice cannot run on input_ids .*\(1, 16\).* Pass a batch"):
        compute_outputs(model, make_inputs(model))


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        ({"a": [1.0]}, {"b": [1.0]}, r"The outputs are \['b'\] instead of \['a'\]"),
        ({"a": [1.0, 2.0]}, {"a": [1.0]}, r"a has shape \(1,\) instead of \(2,\)"),
        ({"a": [1.0, 50.0]}, {"a": [1.0, 50.1]}, "a differs from the masked model's by 0.1 "),
        ({"a": [float("inf")]}, {"a": [1.0]}, "a holds NaN or infinity"),
        ({"a": [1.0]}, {"a": [float("nan")]}, "a differs from the masked model's by nan"),
    ],
)
def test_differences_are_refused(expected, actual, message):
    def tensors(values):
        return {name: torch.tensor(value) for name, value in values.items()}

    with pytest.raises(VerificationError, match=message):
        compare_outputs(tensors(expected), tensors(actual))


def test_rounding_is_allowed():
    compare_outputs({"a": torch.tensor([1.0])}, {"a": torch.tensor([1.00005])})
    compare_outputs({"a": torch.empty(0)}, {"a": torch.empty(0)})
