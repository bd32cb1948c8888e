"""Zeroing, finding zeros, removing them: every family, against arithmetic and against the masked model."""

import copy

import pytest
import torch
import transformers
from conftest import FAMILIES, STACK, build, half_masks, logits, make_batch
from watching import Watching

from hf_slim import model_slim
from hf_slim.compaction.cut_tensors import compact_model, round_masks
from hf_slim.compaction.zeros import find_zero_units, zero_units
from hf_slim.parallel.offloaded_weights import change_tensor
from hf_slim.parallel.tiles import find_nonzero
from hf_slim.saving.report import count_parameters
from hf_slim.structures.discovery import find_structures
from hf_slim.structures.structure import get_tensor

PER_UNIT = {
    # Parameters of one channel, and of one head or group, summed over the structures of a kind (see EXPECTED_DROP).
    "bert": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "roberta": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "electra": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "distilbert": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "gpt2": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "opt": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "llama": (3 * 32, (2 + 1 + 1 + 2) * 8 * 32),
    "mistral": (3 * 32, (2 + 1 + 1 + 2) * 8 * 32),
    "qwen2": (3 * 32, (2 + 1 + 1 + 2) * 4 * 32 + (2 + 1 + 1) * 4),
    "bart": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
    "t5": (2 * 32, 4 * 8 * 32),
    "t5-gated": (3 * 32, 4 * 8 * 32),
    "vit": (2 * 32 + 1, 4 * 8 * 32 + 3 * 8),
}


def dropped_parameters(family: str) -> int:
    """Half of the units of every structure, by arithmetic."""
    channel, head = PER_UNIT[family]
    if family == "bart":
        return (2 * 32 + 2 * 24) * channel + 6 * 2 * head
    if family.startswith("t5"):
        tables = 2 * 2 * 32
        return 4 * 32 * channel + 3 * 2 * 2 * head + tables
    return 2 * 32 * channel + 2 * 2 * head


def test_masked_and_slimmed_agree(family):
    model = build(family)
    structures = find_structures(model).structures
    batch, dense = make_batch(model), logits(model, make_batch(model))
    masks = half_masks(structures)
    zero_units(model, structures, masks)
    masked = logits(model, batch)
    assert (masked - dense).abs().max() > 1e-3, "masking changed nothing, so the comparison would prove nothing"
    slim = copy.deepcopy(model)
    compact_model(slim, structures, masks)
    assert (logits(slim, batch) - masked).abs().max() <= 1e-5 * max(1, masked.abs().max())
    assert count_parameters(model) - count_parameters(slim) == dropped_parameters(family)
    assert [s.units for s in find_structures(slim).structures] == [s.units // 2 for s in structures]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "qwen2", "bart", "t5", "t5-gated"])
def test_generation_agrees_token_by_token(name, implementation):
    if implementation == "sdpa" and not getattr(transformers, FAMILIES[name][0])._supports_sdpa:
        pytest.skip(f"{name} has eager attention only in transformers {transformers.__version__}")
    model = build(name, attn_implementation=implementation)
    structures = find_structures(model).structures
    masks = half_masks(structures)
    zero_units(model, structures, masks)
    slim = copy.deepcopy(model)
    compact_model(slim, structures, masks)
    ids = make_batch(model)["input_ids"]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(slim.generate(ids, use_cache=True, **settings), expected)
    assert torch.equal(slim.generate(ids, use_cache=False, **settings), expected)


def test_sizes_of_the_layers_follow(family):
    model = build(family)
    structures = find_structures(model).structures
    compact_model(model, structures, half_masks(structures))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
            assert module.bias is None or module.bias.shape == (module.out_features,)
            assert module.weight.is_contiguous()
        if isinstance(module, torch.nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim)


def test_training_goes_on_after_compaction(family):
    model = build(family).train()
    structures = find_structures(model).structures
    before = dict(model.named_parameters())
    model(**make_batch(model)).loss.backward()
    compact_model(model, structures, half_masks(structures))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    model.zero_grad()
    model(**make_batch(model)).loss.backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_zeros_are_found_by_the_second_layer_alone():
    model = build("bert")
    mha, ffn = find_structures(model).structures[:2]
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, [3, 5]] = 0
        layer.attention.output.dense.weight[:, 8:16] = 0
        layer.attention.output.dense.weight[:, 16:23] = 0
        layer.intermediate.dense.weight[7] = 0
    masks = find_zero_units(model, [mha, ffn])
    assert (~masks[ffn.name]).nonzero().flatten().tolist() == [3, 5]
    assert (~masks[mha.name]).nonzero().flatten().tolist() == [1]
    assert all(mask.all() for mask in find_zero_units(model, [mha, ffn], whole=True).values())
    zero_units(model, [mha, ffn], masks)
    whole = find_zero_units(model, [mha, ffn], whole=True)
    assert all(torch.equal(whole[name], masks[name]) for name in masks)


def test_rounding_keeps_zero_units():
    structures = find_structures(build("bert")).structures[:2]
    mha, ffn = structures
    masks = {mha.name: torch.zeros(4, dtype=torch.bool), ffn.name: torch.zeros(64, dtype=torch.bool)}
    masks[ffn.name][[1, 40, 41]] = True
    rounded = round_masks(structures, masks, 16)
    assert rounded[mha.name].tolist() == [True, False, False, False]
    assert rounded[ffn.name].nonzero().flatten().tolist() == [0, *range(1, 14), 40, 41]
    assert int(round_masks(structures, masks, 1)[ffn.name].sum()) == 3


def test_an_empty_mask_is_refused():
    model = build("bert")
    structures = find_structures(model).structures
    masks = half_masks(structures)
    masks[structures[0].name][:] = False
    with pytest.raises(ValueError, match="attention.output.dense: the mask keeps none of the 4 units"):
        compact_model(model, structures, masks)


def test_stacked_experts_keep_rows_of_16_bytes():
    """The grouped matrix product takes no others."""
    config = transformers.MixtralConfig(
        vocab_size=99, **{**STACK, "num_key_value_heads": 4}, num_local_experts=4, num_experts_per_tok=2
    )
    model = transformers.MixtralForCausalLM(config).eval()
    structures = find_structures(model).of_kind("ffn")
    assert [(s.name, s.units, s.multiple) for s in structures] == [
        ("model.layers.0.mlp.experts.down_proj", 64, 4),
        ("model.layers.1.mlp.experts.down_proj", 64, 4),
    ]
    zero_units(model, structures, {s.name: torch.arange(s.units) < 39 for s in structures})
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        slim = model_slim(model, 1)
        assert [s.units for s in find_structures(slim).of_kind("ffn")] == [40, 40]
        torch.testing.assert_close(slim(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_compacted_tensors_are_contiguous_and_own_no_more_than_they_need(family):
    model = build(family)
    structures = find_structures(model).structures
    compact_model(model, structures, half_masks(structures))
    sliced = {member.tensor for structure in structures for member in structure.members}
    for name in sliced:
        tensor = get_tensor(model, name)
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES)
def test_only_what_is_zero_counts_as_zero(dtype):
    smallest = {torch.float32: 1e-45, torch.float64: 5e-324, torch.float16: 6e-8, torch.bfloat16: 9.2e-41}
    values = [0.0, -0.0, 1.0, -1.0, float("nan"), smallest.get(dtype, 2e-3), -smallest.get(dtype, 2e-3)]
    if dtype != torch.float8_e4m3fn:
        values += [float("inf"), -float("inf")]
    weight = torch.zeros(5, len(values)).to(dtype)
    weight[3] = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = [False, False] + [True] * (len(values) - 2)
    assert find_nonzero(1, weight).tolist() == expected
    assert find_nonzero(0, weight.t().contiguous()).tolist() == expected
    assert find_nonzero(2, weight[None].expand(2, -1, -1)).tolist() == expected
    assert find_nonzero(0, weight[3]).tolist() == expected
    assert find_nonzero(1, weight[:0]).tolist() == [False] * len(values)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_no_tensor_of_the_size_of_a_weight_is_made_to_find_zeros(name):
    model = build(name)
    structures = find_structures(model).structures
    sizes = [get_tensor(model, m.tensor).numel() for s in structures for m in s.deciders]
    with Watching() as watching:
        find_zero_units(model, structures)
    assert watching.made and max(shape.numel() for shape in watching.made) < min(sizes)


def test_the_old_tensor_is_gone_before_the_next_is_read(monkeypatch):
    model = build("bert")
    structures = find_structures(model).structures
    sizes = []

    def change(model, name, function):
        sizes.append(sum(p.untyped_storage().nbytes() for p in model.parameters()))
        change_tensor(model, name, function)

    monkeypatch.setattr("hf_slim.compaction.cut_tensors.change_tensor", change)
    compact_model(model, structures, half_masks(structures))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
