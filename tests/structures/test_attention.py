"""From attention modules to members, index by index, and to the reasons not to."""

import pytest
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_slim.structures.attention import matches_mha, owner_of, read_mha
from hf_slim.structures.layout_rows import Fused, MhaLayout
from hf_slim.structures.structure import UnaccountedError

SEPARATE = MhaLayout(("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj"))


class Separate(nn.Module):
    """Query heads of width 2, on fewer key-value heads perhaps."""

    def __init__(self, queries=4, keys=4, hidden=6):
        super().__init__()
        self.num_heads, self.head_dim, self.num_key_value_heads = queries, 2, keys
        self.q_proj = nn.Linear(hidden, 2 * queries, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(hidden, 2 * keys, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(2 * queries, hidden)

    def forward(self, x):
        return self.o_proj(self.v_proj(x).view(*x.shape[:-1], self.num_heads, self.head_dim).flatten(-2))


class Packed(nn.Module):
    """One layer for query, key and value of two heads of width 2."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(6, 12), nn.Linear(4, 6)

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :4])


def indexes(structure):
    return {member.tensor: member.index.tolist() for member in structure.members}


def counts(structure):
    return {(count.module, count.attribute): count.value(1) for count in structure.counts}


def test_a_module_matches_by_its_children_and_by_what_it_must_have():
    assert matches_mha(Separate(), SEPARATE) and not matches_mha(Packed(), SEPARATE)
    assert not matches_mha(Separate(), MhaLayout(SEPARATE.inputs, ("out_proj",)))
    assert not matches_mha(Separate(), MhaLayout(SEPARATE.inputs, SEPARATE.outputs, having="missing"))
    assert owner_of(MhaLayout((Fused("self.qkv"),), ("dense",))) == "self"


def test_names_are_relative_and_each_head_owns_its_rows():
    structure = read_mha(Separate(2, 2), SEPARATE)
    assert (structure.name, structure.kind, structure.units) == ("o_proj", "mha", 2)
    assert indexes(structure) == {f"{name}_proj.weight": [[0, 1], [2, 3]] for name in "qkvo"}
    assert [(m.dim, m.role) for m in structure.members] == [(0, "input")] * 3 + [(1, "output")]
    assert counts(structure) == {("", "num_heads"): 1, ("", "num_key_value_heads"): 1}


def test_a_group_owns_its_query_heads_and_is_remembered():
    structure = read_mha(Separate(4, 2), SEPARATE)
    wide, narrow = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]]
    assert list(indexes(structure).values()) == [wide, narrow, narrow, wide]
    assert counts(structure) == {
        ("", "num_heads"): 2,
        ("", "num_key_value_heads"): 1,
        ("", "hf_slim_key_value_heads"): 1,
    }


def test_a_shared_key_value_head_belongs_to_no_unit():
    structure = read_mha(Separate(4, 1), SEPARATE)
    assert structure.units == 4
    assert list(indexes(structure)) == ["q_proj.weight", "o_proj.weight"]
    assert counts(structure) == {("", "num_heads"): 1}


@pytest.mark.parametrize(
    ("fused", "expected"),
    [
        (Fused("qkv"), [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]),
        (Fused("qkv", by_unit=True), [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]),
        (Fused("qkv", copies=2), [[[0, 1, 6, 7]], [[2, 3, 8, 9]], [[4, 5, 10, 11]]]),
    ],
    ids=["parts", "by unit", "copies"],
)
def test_a_fused_layer_holds_query_key_and_value(fused, expected):
    structure = read_mha(Packed(), MhaLayout((fused,), ("proj",)))
    weights = [m.index.tolist() for m in structure.members if m.tensor == "qkv.weight"]
    biases = [m.index.tolist() for m in structure.members if m.tensor == "qkv.bias"]
    assert weights == biases == expected


def test_what_belongs_to_heads_beside_the_layers():
    module = Separate(2, 2)
    module.sinks = nn.Parameter(nn.init.ones_(module.q_proj.weight.new_empty(2)))
    module.gate_proj = nn.Linear(6, 4, bias=False)
    module.q_norm = nn.LayerNorm(2)  # one for all heads, which stays
    module.rotary_emb = nn.Linear(2, 2)
    extra = [(m.tensor, m.dim, m.index.tolist()) for m in read_mha(module, SEPARATE).members if m.role == "extra"]
    assert extra == [("gate_proj.weight", 0, [[0, 1], [2, 3]]), ("sinks", 0, [[0], [1]])]


def test_an_rms_norm_over_all_heads_is_folded():
    module = Separate(2, 2)
    module.q_norm = LlamaRMSNorm(4, eps=1e-3)
    structure = read_mha(module, SEPARATE)
    assert [(m.tensor, m.index.tolist()) for m in structure.members if m.role == "norm"] == [
        ("q_norm.weight", [[0, 1], [2, 3]])
    ]
    assert counts(structure)["q_norm", "variance_epsilon"] == pytest.approx(2e-3)


class Replacing(nn.Module):
    """Attention whose code puts another module in its place."""

    def __init__(self):
        super().__init__()
        self.self, self.dense = Packed(), nn.Linear(4, 6)

    def forward(self, x):
        self.self = Packed()
        return self.dense(self.self(x))


class Wide(Separate):
    """Attention whose code reads a width under a name that nothing explains."""

    def __init__(self):
        super().__init__()
        self.my_dim = 8

    def forward(self, x):
        return self.o_proj(x.new_ones(self.my_dim))


class Disagreeing(Separate):
    """Attention whose code reads another number of heads than the weights have."""

    def __init__(self):
        super().__init__()
        self.num_kv_heads = 2

    def forward(self, x):
        return self.o_proj(x.repeat_interleave(self.num_kv_heads))


def changed(**attributes):
    module = Separate()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("module", "layout", "reason"),
    [
        (Replacing(), MhaLayout((Fused("self.qkv"),), ("dense",)), "its code replaces self by a new module"),
        (changed(lambdas=nn.Parameter(nn.Linear(8, 1).weight)), SEPARATE, r"lambdas of shape \(1, 8\) may depend on"),
        (changed(q_norm=nn.LayerNorm(8)), SEPARATE, "q_norm normalizes all heads together, and not as an RMS norm"),
        (
            changed(num_heads=3),
            SEPARATE,
            "3 query heads and 4 key-value heads do not explain the 8 values that o_proj",
        ),
        (changed(num_heads=None, head_dim=None), SEPARATE, "none of its attributes tells the width of a head"),
        (Disagreeing(), SEPARATE, "^its attribute num_kv_heads is 2, but the weights say 4$"),
        (Wide(), SEPARATE, "^its code reads my_dim = 8, which may be a width of its 4 heads$"),
    ],
    ids=["replaced", "tensor", "norm", "heads", "nothing", "attribute", "width"],
)
def test_what_nothing_explains_is_refused(module, layout, reason):
    with pytest.raises(UnaccountedError, match=reason):
        read_mha(module, layout)
