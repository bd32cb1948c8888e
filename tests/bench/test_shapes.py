"""The models that are measured: their sizes, their operations, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

from hf_slim.bench.flags import BenchArguments
from hf_slim.bench.shapes import SHAPES, Case, make_cases
from hf_slim.structures import find_structures

WIDTH, CHANNELS = 32, 128
STACK = {"vocab_size": 99, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "bert": BertConfig(**STACK, intermediate_size=CHANNELS, max_position_embeddings=16),
    "llama": LlamaConfig(**STACK, num_key_value_heads=2, intermediate_size=CHANNELS),
    "gpt2": GPT2Config(vocab_size=99, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=16),
    "t5": T5Config(),
    "vit": ViTConfig(),
}


def _make(folder: Path, name: str, *sparsities: str, **flags) -> list[Case]:
    path = folder / f"{name}.json"
    CONFIGS[name].to_json_file(path)
    arguments = BenchArguments(
        [str(path)], sequence_lengths=flags.pop("sequence_lengths", [8]), sparsities=list(sparsities), **flags
    )
    return [replace(case, batch_size=2, length=8) for case in make_cases(arguments)]


def test_a_stock_shape(tmp_path):
    case, ffn_only = _make(tmp_path, "llama", "0.5,0.5", "0.5,0")
    assert case.is_stock and ffn_only.is_stock
    assert (case.slim_config.num_attention_heads, case.slim_config.num_key_value_heads) == (2, 1)
    assert (case.slim_config.intermediate_size, ffn_only.slim_config.intermediate_size) == (64, 64)
    assert case.removed == 0.5
    # The FFN, three of width by channels; attention, two of width by width, and two by half of it.
    ffn, attention = 3 * WIDTH * CHANNELS, 3 * WIDTH * WIDTH
    assert ffn_only.removed == pytest.approx(ffn / 2 / (ffn + attention))
    # Forward and backward pass do three times the products of the forward pass, all of whose inputs have gradients.
    assert case.count_flops(backward=True) == 3 * case.count_flops()
    assert case.count_flops(slim=True) < case.count_flops()


def test_the_models_of_a_case(tmp_path):
    (case,) = _make(tmp_path, "bert", "0.5,0.5")
    assert not case.is_stock
    dense, masked, slim, stock = case.build(), case.build_masked(), case.build_slim(), case.build(case.slim_config)
    assert [sum(p.numel() for p in model.parameters()) for model in (dense, masked, slim, stock)] == [
        *[case.parameters] * 2,
        *[case.slim_parameters] * 2,
    ]
    assert all(
        torch.equal(one, other) for one, other in zip(dense.parameters(), case.build().parameters(), strict=True)
    )
    assert [s.units for s in find_structures(slim).structures] == [2, 64, 2, 64]
    batch = case.make_batch()
    torch.testing.assert_close(slim.eval()(**batch).logits, masked.eval()(**batch).logits)
    slim.save_pretrained(tmp_path / "slim")
    torch.testing.assert_close(case.load(tmp_path / "slim").eval()(**batch).logits, slim(**batch).logits)


@pytest.mark.parametrize(("name", "shape"), [("bert", (6,)), ("gpt2", (6, 8))])
def test_a_batch(name, shape, tmp_path):
    (case,) = _make(tmp_path, name, "0.5,0.5")
    batch = case.make_batch(batches=3)
    assert batch["input_ids"].shape == (6, 8) and batch["labels"].shape == shape
    assert 5 <= batch["input_ids"].min() and batch["input_ids"].max() < 99
    assert all(torch.equal(values, case.make_batch(3)[key]) for key, values in batch.items())


def test_what_tells_a_case(tmp_path):
    (case,) = _make(tmp_path, "gpt2", "0.5,0.25", layers=[3])
    who = {"model": str(tmp_path / "gpt2.json"), "layers": 3, "sparsity": "0.5,0.25"}
    assert case.to_record() == {**who, "batch_size": 2, "sequence_length": 8}
    assert str(case) == f"{who['model']}, 3 layers, 0.5,0.25, 2 x 8"
    assert replace(case, batch_size=0).to_record() == who


def test_the_shapes_have_their_sizes():
    cases = make_cases(BenchArguments(list(SHAPES), sparsities=["0.5,0.5"]))
    sizes = {case.name: round(case.parameters / 1e6) for case in cases}
    assert sizes == {"bge-small": 33, "bge-base": 109, "bert-large": 335, "gpt2": 124, "llama-1b": 1100}
    assert [case.is_stock for case in cases] == [False, False, False, False, True]


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_other_models_than_of_text_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"--models .*{name}\.json is a {name} model; bench takes text encoders"):
        _make(tmp_path, name, "0.5,0.5")


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^--sequence_lengths 17 is more than .* takes, 16: make it smaller"):
        _make(tmp_path, "bert", "0.5,0.5", sequence_lengths=[8, 17])
    with pytest.raises(ValueError, match=r"with --sparsities 0\.9,0\.5: ffn2_sparsity=0\.9 is unreachable"):
        _make(tmp_path, "bert", "0.9,0.5")
    with pytest.raises(ValueError, match=r"^--models bge-tiny: there is no such shape, file or folder\. Name"):
        make_cases(BenchArguments(["bge-tiny"]))
