"""The two calls."""

import copy

import pytest
import torch
from conftest import build, logits, make_batch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_slim import SlimTrainerCallback, find_structures, model_slim, parse_auto_slim_config

LAYER = "bert.encoder.layer.{}"


def test_entries():
    ffn, mha = parse_auto_slim_config(
        build("bert"), ffn2_sparsity=0.8, mha_sparsity=0.6, start_step=5, pruning_type="magnitude"
    )
    shared = {"start_step": 5, "pruning_type": "magnitude"}
    assert ffn == {
        "op_names": [f"{LAYER.format(n)}.output.dense" for n in (0, 1)],
        "pattern": "channelx1",
        "target_sparsity": 0.8,
        **shared,
    }
    names = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    assert mha == {
        "op_names": [f"{LAYER.format(n)}.{name}" for n in (0, 1) for name in names],
        "pattern": "mha",
        "target_sparsity": 0.6,
        **shared,
    }


def test_zero_sparsity_gives_no_entry():
    assert [entry["pattern"] for entry in parse_auto_slim_config(build("bert"), 0.0, mha_sparsity=0.5)] == ["mha"]
    assert parse_auto_slim_config(build("bert"), 0.0, 0.0) == []
    assert [entry["target_sparsity"] for entry in parse_auto_slim_config(build("bert"))] == [0.8, 0.6]


def test_model_slim_needs_only_zeros_in_the_second_layer(family):
    model = build(family)
    structures = find_structures(model).structures
    with torch.no_grad():
        for structure in structures:
            for member in structure.outputs:
                dropped = member.index[: structure.units // 2].flatten()
                model.get_parameter(member.tensor).index_fill_(member.dim, dropped, 0)
    slim = model_slim(copy.deepcopy(model), round_multiplier=8)
    assert [s.units for s in find_structures(slim).structures] == [s.units // 2 for s in structures]
    batch = make_batch(model)
    expected = logits(model, batch)
    assert (logits(slim, batch) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_model_slim_rounds_up_and_keeps_zero_units():
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :30] = 0
    slim = model_slim(model, round_multiplier=32)
    assert [s.units for s in find_structures(slim).of_kind("ffn")] == [64, 64]
    assert [s.units for s in find_structures(model_slim(model, 8)).of_kind("ffn")] == [40, 64]
    assert (model.bert.encoder.layer[0].output.dense.weight == 0).all(0).sum() == 6


def test_whole_flow_of_the_two_calls(tmp_path):
    """Train with the parsed list, compact with model_slim, save as usual, load with the stock class."""
    model = build("bert", spread=0.02)
    entries = parse_auto_slim_config(
        model,
        0.75,
        0.5,
        start_step=2,
        end_step=8,
        pruning_frequency=2,
        pruning_scope="local",
        sparsity_decay_type="cube",
    )
    data = [{"input_ids": torch.randint(5, 99, (7,)), "labels": n % 2} for n in range(16)]
    arguments = TrainingArguments(tmp_path, max_steps=10, save_strategy="no", report_to="none")
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SlimTrainerCallback(entries)])
    trainer.train()
    model_slim(model, round_multiplier=16)
    assert [s.units for s in find_structures(model).structures] == [2, 16, 2, 16]
    model.save_pretrained(tmp_path / "slim")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")
    assert torch.equal(logits(loaded, make_batch(model)), logits(model.eval(), make_batch(model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op_names": ["classifier"]}, "classifier cannot be slimmed as channelx1"),
        ({"end_step": 99}, "slim_end=99 is beyond the last training step, 10"),
    ],
)
def test_bad_entries_are_refused_before_training(change, message, tmp_path):
    model = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    entries = [{**parse_auto_slim_config(model, ffn2_sparsity=0.5)[0], **change}]
    arguments = TrainingArguments(tmp_path, max_steps=10, save_strategy="no", report_to="none")
    data = [{"input_ids": torch.ones(7, dtype=torch.long), "labels": 0}]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SlimTrainerCallback(entries)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
