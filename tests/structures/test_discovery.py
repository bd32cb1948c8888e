"""What is found in the families, what is skipped, what patterns exclude."""

import pytest
import torch
from conftest import build
from torch import nn
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ReformerConfig,
    ReformerModel,
)

from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.structures.discovery import exclude_structures, find_structures, require_structures

EXPECTED = {
    "bert": {"ffn": [64, 64], "mha": [4, 4]},
    "roberta": {"ffn": [64, 64], "mha": [4, 4]},
    "electra": {"ffn": [64, 64], "mha": [4, 4]},
    "distilbert": {"ffn": [64, 64], "mha": [4, 4]},
    "gpt2": {"ffn": [64, 64], "mha": [4, 4]},
    "opt": {"ffn": [64, 64], "mha": [4, 4]},
    "llama": {"ffn": [64, 64], "mha": [4, 4]},
    "mistral": {"ffn": [64, 64], "mha": [4, 4]},
    "qwen2": {"ffn": [64, 64], "mha": [4, 4]},
    "bart": {"ffn": [64, 64, 48, 48], "mha": [4, 4, 4, 4, 4, 4]},
    "t5": {"ffn": [64, 64, 64, 64], "mha": [4, 4, 4]},
    "t5-gated": {"ffn": [64, 64, 64, 64], "mha": [4, 4, 4]},
    "vit": {"ffn": [64, 64], "mha": [4, 4]},
}


def test_every_family_is_found_whole(family):
    found = find_structures(build(family))
    assert {kind: [s.units for s in found.of_kind(kind)] for kind in ("ffn", "mha")} == EXPECTED[family]
    assert found.skipped == ()


def test_bert_layer_in_full():
    mha, ffn = find_structures(build("bert")).structures[:2]
    prefix = "bert.encoder.layer.0"
    head = [list(range(8)), list(range(8, 16)), list(range(16, 24)), list(range(24, 32))]
    projections = [f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")]
    assert [(m.tensor, m.dim, m.role) for m in mha.members] == [
        *(entry for name in projections for entry in ((f"{name}.weight", 0, "input"), (f"{name}.bias", 0, "extra"))),
        (f"{prefix}.attention.output.dense.weight", 1, "output"),
    ]
    assert all(m.index.tolist() == head for m in mha.members)
    assert {(c.attribute, c.per_unit) for c in mha.counts} == {("num_attention_heads", 1), ("all_head_size", 8)}
    assert [(m.tensor, m.dim) for m in ffn.members] == [
        (f"{prefix}.intermediate.dense.weight", 0),
        (f"{prefix}.intermediate.dense.bias", 0),
        (f"{prefix}.output.dense.weight", 1),
    ]


def test_fused_transposed_projection():
    mha = find_structures(build("gpt2")).structures[0]
    weights = [m for m in mha.members if m.tensor.endswith("c_attn.weight")]
    assert [m.dim for m in weights] == [1, 1, 1]
    assert [m.index[1].tolist() for m in weights] == [list(range(8, 16)), list(range(40, 48)), list(range(72, 80))]


def test_group_owns_its_query_heads():
    mha = find_structures(build("llama")).structures[0]
    by_name = {m.tensor.split(".")[-2]: m.index[1].tolist() for m in mha.members}
    assert by_name["q_proj"] == by_name["o_proj"] == list(range(16, 32))
    assert by_name["k_proj"] == by_name["v_proj"] == list(range(8, 16))


def test_shared_bias_joins_the_blocks():
    found = find_structures(build("t5")).of_kind("mha")
    assert [s.name for s in found] == [
        "encoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.0.SelfAttention.o",
        "decoder.block.*.layer.1.EncDecAttention.o",
    ]
    assert [sum("relative_attention_bias" in m.tensor for m in s.members) for s in found] == [1, 1, 0]
    assert [len(s.outputs) for s in found] == [2, 2, 2]


def test_cross_attention_of_gpt2():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True))
    names = [s.name for s in find_structures(model).of_kind("mha")]
    assert names == ["transformer.h.0.attn.c_proj", "transformer.h.0.crossattention.c_proj"]


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = build("bert")
    assert len(find_structures(model).structures) == 4


def test_unexplained_parameters_are_skipped_with_the_reason():
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = DiffLlamaForCausalLM(DiffLlamaConfig(vocab_size=9, intermediate_size=64, pad_token_id=None, **fields))
    found = find_structures(model)
    assert [(s.name, s.kind) for s in found.skipped] == [("model.layers.0.self_attn", "mha")]
    assert "lambda_q1 of shape (8,) may depend on the 4 heads" in found.skipped[0].reason
    assert "lambda_q1" in str(found)
    with pytest.raises(ValueError, match=r"no attention module that can be slimmed.*\n.*self_attn: lambda_q1"):
        require_structures(model, found, "mha")


def test_attention_without_a_layout_is_reported():
    config = ReformerConfig(attn_layers=["local"], hidden_size=32, num_attention_heads=2, axial_pos_embds=False)
    (skipped,) = find_structures(ReformerModel(config)).skipped
    assert (skipped.name, skipped.kind) == ("encoder.layers.0.attention", "mha")
    assert "ReformerAttention has no known layout; its layers are self_attention.query" in skipped.reason


def test_code_that_reads_an_unknown_width_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.head_dim, self.total_dim = 4, 16
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 16) for _ in range(4))
            self.o_proj = nn.Linear(16, 8)

        def forward(self, x):
            return self.o_proj(torch.zeros(*x.shape[:-1], self.total_dim))

    (skipped,) = find_structures(nn.Sequential(Attention())).skipped
    assert skipped.reason == "its code reads total_dim = 16, which may be a width of its 4 heads"


def test_norm_between_the_layers_is_skipped():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 8)

    (skipped,) = find_structures(nn.Sequential(Normed())).skipped
    assert skipped.name == "0"
    assert skipped.reason.startswith("norm.weight of shape (24,) may depend on the 24 intermediate channels")


def test_width_equal_to_the_channels_is_no_obstacle():
    assert len(find_structures(build("bert", intermediate_size=32)).of_kind("ffn")) == 2
    assert len(find_structures(build("opt", ffn_dim=32)).of_kind("ffn")) == 2


def test_nothing_to_slim_names_the_largest_modules():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.ModuleDict({"table": nn.Embedding(1000, 7)}))
    with pytest.raises(ValueError) as caught:
        require_structures(model, find_structures(model))
    assert str(caught.value) == (
        "Sequential has no structure that can be slimmed. Nothing in it looks like one. Its largest modules and their "
        "numbers of parameters:\n  2.table (Embedding): 7,000\n  0 (Linear): 12"
    )
    with pytest.raises(ValueError, match="has no attention module that can be slimmed.*It has no parameters at all"):
        require_structures(nn.ReLU(), find_structures(nn.ReLU()), "mha")


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("bert.encoder.layer.0", ["1.attention", "1"]),
        ("encoder.layer.0", ["1.attention", "1"]),
        (".*attention.*", ["0", "1"]),
        ("*attention*", ["0", "1"]),
        (r"layer\.1\.output", ["0.attention", "0", "1.attention"]),
        ("query", ["0", "1"]),
        ("(?i)LAYER.1", ["0.attention", "0"]),
    ],
)
def test_patterns(pattern, left):
    structures = find_structures(build("bert")).structures
    names = [s.name for s in exclude_structures(structures, [pattern])]
    assert names == [f"bert.encoder.layer.{part}.output.dense" for part in left]


def test_pattern_for_layer_1_leaves_layer_10():
    structures = find_structures(build("bert", num_hidden_layers=11)).structures
    assert len(exclude_structures(structures, ["layer.1"])) == 20


def test_pattern_without_a_match_is_refused():
    with pytest.raises(ValueError, match="the pattern 'layer.7' matches no module.*bert.encoder.layer.0"):
        exclude_structures(find_structures(build("bert")).structures, ["layer.7"])


def test_query_heads_are_the_units_of_multi_query_attention():
    config = LlamaConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1
    )
    (mha,) = find_structures(LlamaForCausalLM(config)).of_kind("mha")
    assert mha.units == 4
    assert [m.tensor.split(".")[-2] for m in mha.members] == ["q_proj", "o_proj"]
    assert [(c.attribute, c.value(2)) for c in mha.counts] == [("num_key_value_groups", 2)]


def test_one_group_that_is_left_stays_one_unit():
    model = build("llama")
    structures = find_structures(model).of_kind("mha")
    compact_model(model, structures, {s.name: torch.arange(s.units) < 1 for s in structures})
    assert [s.units for s in find_structures(model).of_kind("mha")] == [1, 1]


@pytest.mark.parametrize("shared", ["attention.self.query", "intermediate.dense", "output", "attention.self"])
def test_modules_that_two_blocks_share(shared):
    """They belong to both, so that neither can get sizes of its own; a whole block that two names have can."""
    model = build("bert")
    first, second = model.bert.encoder.layer
    parent, _, name = shared.rpartition(".")
    setattr(second.get_submodule(parent), name, first.get_submodule(shared))
    kind = "mha" if "attention" in shared else "ffn"
    found = find_structures(model)
    assert found.of_kind(kind) == ()
    assert sum("is used by more than one module" in skip.reason for skip in found.skipped) == 2
    model = build("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    found = find_structures(model)
    assert [s.kind for s in found.structures] == ["mha", "ffn"] and found.skipped == ()
