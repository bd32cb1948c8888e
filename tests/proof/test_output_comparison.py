"""What models compute, the comparison, and that it finds a structure taken for something that it is not."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from conftest import STACK, TEXT, build
from transformers import BatchEncoding, DynamicCache

from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.made_inputs import make_inputs
from hf_slim.proof.output_comparison import VerificationError, compare_outputs, compute_outputs
from hf_slim.structures.structure import Count, Member, Structure, blocks

INF, NAN = float("inf"), float("nan")


def test_every_family_runs_on_made_inputs(family):
    model = build(family).train()
    outputs = compute_outputs(model, make_inputs(model))
    assert "logits" in outputs and model.training


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


def test_a_model_that_cannot_run_is_named():
    model = build("bert")
    with pytest.raises(ValueError, match=r"BertForSeq.* cannot run on pixel_values \(1, 3\): .* Pass a batch"):
        compute_outputs(model, {"pixel_values": torch.ones(1, 3)})


def test_multiple_choices_get_two():
    model = transformers.BertForMultipleChoice(build("bert").config)
    assert make_inputs(model)["input_ids"].shape == (1, 2, 16)


def test_a_batch_of_a_tokenizer_with_labels_is_taken():
    batch = BatchEncoding({"input_ids": [[5, 6, 7], [8, 9, 10]], "labels": [0, 1]}, tensor_type="pt")
    assert sorted(compute_outputs(build("bert"), batch)) == ["logits", "loss"]


def test_outputs_that_have_the_shape_of_the_units_are_left_out():
    model = build("gpt2", output_attentions=True, output_hidden_states=True)
    batch = {"input_ids": torch.arange(5, 9)[None], "use_cache": True}
    assert sorted(compute_outputs(model, batch)) == [
        "hidden_states[0]",
        "hidden_states[1]",
        "hidden_states[2]",
        "logits",
    ]


@dataclass
class Plain:
    """An output that is no mapping."""

    scores: torch.Tensor
    past_states: torch.Tensor


class Nested(torch.nn.Linear):
    """A model whose outputs are nested in every way."""

    def forward(self, x):
        seen = super().forward(x)
        parts = [seen, (seen.long(), {"deep": seen, "cache": seen}), DynamicCache()]
        return {"plain": Plain(seen, seen), "parts": parts, "drawn": torch.rand(3), "none": None}


def test_nested_outputs_are_named_and_random_ones_repeat():
    model, batch = Nested(2, 2), {"x": torch.ones(1, 2)}
    first, again = compute_outputs(model, batch), compute_outputs(model, batch)
    assert list(first) == ["plain.scores", "parts[0]", "parts[1][1].deep", "drawn"]
    assert torch.equal(first["drawn"], again["drawn"])


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        ({"a": [1.0]}, {"b": [1.0]}, r"The outputs are \['b'\] instead of \['a'\]"),
        ({"a": [1.0, 2.0]}, {"a": [1.0]}, r"a has shape \(1,\) instead of \(2,\)"),
        ({"a": [1.0, 50.0]}, {"a": [1.0, 50.1]}, "a differs from the masked model's by 0.1 "),
        ({"a": [INF]}, {"a": [INF]}, "a holds NaN or nothing but infinity"),
        ({"a": [1.0, NAN]}, {"a": [1.0, NAN]}, "a holds NaN or nothing but infinity"),
        ({"a": [1.0, -INF]}, {"a": [1.0, INF]}, r"a differs from the masked model's by inf \(allowed: 0\)"),
        ({"a": [1.0, 2.0]}, {"a": [1.0, INF]}, "a differs from the masked model's by inf"),
        ({"a": [1.0, -3e38]}, {"a": [1.1, -3e38]}, r"a differs from the masked model's by 0.1 \(allowed: 0.00011\)"),
        ({"a": [1.0, -3e38]}, {"a": [1.0, -2e38]}, r"a differs from the masked model's by 1e\+38"),
        ({"a": [1.0]}, {"a": [NAN]}, "a differs from the masked model's by nan"),
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
    compare_outputs({"a": torch.tensor([1.0, INF, -INF])}, {"a": torch.tensor([1.0, INF, -INF])})


def _plan(where: torch.Tensor) -> Structure:
    """BERT's first feed-forward network with given rows of FFN1 for the units."""
    prefix, columns = "bert.encoder.layer.0", blocks(64, 1)
    rows = [Member(f"{prefix}.intermediate.dense.{leaf}", 0, where, "input") for leaf in ("weight", "bias")]
    members = (Member(f"{prefix}.output.dense.weight", 1, columns, "output"), *rows)
    return Structure(
        f"{prefix}.output.dense", "ffn", 64, members, (Count(f"{prefix}.output.dense", "in_features", 1),)
    )


@pytest.mark.parametrize("where", ["right", "reversed", "shifted", "neighbours swapped"])
def test_a_structure_taken_for_something_else_is_found(where):
    right = blocks(64, 1)
    rows = {
        "right": right,
        "reversed": right.flip(0),
        "shifted": right.roll(1, 0),
        "neighbours swapped": right.view(32, 2).flip(1).view(64, 1),
    }
    model, structure = build("bert"), _plan(rows[where])
    masks = {structure.name: torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.6}
    zero_units(model, [structure], masks)
    inputs = make_inputs(model)
    expected, slim = compute_outputs(model, inputs), copy.deepcopy(model)
    compact_model(slim, [structure], masks)
    if where == "right":
        compare_outputs(expected, compute_outputs(slim, inputs))
        return
    with pytest.raises(VerificationError, match="logits differs from the masked model's by .* \\(allowed: "):
        compare_outputs(expected, compute_outputs(slim, inputs))
