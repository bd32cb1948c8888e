"""The table of layouts, and teaching it more."""

import pytest
from conftest import build
from torch import nn

from hf_slim import FfnLayout, Fused, MhaLayout, find_structures, register_layout
from hf_slim.structures.projection_names import FFN_LAYOUTS, MHA_LAYOUTS, layouts_of


class Network(nn.Module):
    """A feed-forward network that no row describes."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.leave(self.enter(x).relu())


class Mixing(Network):
    """The same with channels that depend on one another."""

    def forward(self, x):
        return self.leave(self.enter(x).softmax(-1))


ROW = FfnLayout(("enter",), "leave")


def test_no_row_stands_twice_and_larger_ones_are_tried_first():
    rows = (*FFN_LAYOUTS, *MHA_LAYOUTS)
    assert len(set(rows)) == len(rows)
    for kind, table in ((FfnLayout, FFN_LAYOUTS), (MhaLayout, MHA_LAYOUTS)):
        sizes = [row.size for row in layouts_of(kind)]
        assert sizes == sorted(sizes, reverse=True) and set(layouts_of(kind)) == set(table)
    assert MHA_LAYOUTS[0].size == 4 and MHA_LAYOUTS[0].roots >= {"o_proj", "output_projection"}
    assert MhaLayout((Fused("qkv"),), ("proj",), having="mp_num").size == 3


def test_a_registered_layout_is_found(own_layouts):
    assert find_structures(nn.Sequential(Network())).structures == ()
    register_layout(ROW)
    (structure,) = find_structures(nn.Sequential(Network())).structures
    assert (structure.name, structure.kind, structure.units) == ("0.leave", "ffn", 6)


def test_a_strangers_module_is_tried_whoever_named_its_layers(own_layouts):
    register_layout(ROW)
    found = find_structures(nn.Sequential(Network(), Mixing()))
    assert [s.name for s in found.structures] == ["0.leave"]
    assert [s.name for s in found.skipped] == ["1"]
    assert found.skipped[0].reason.startswith("what it computes with 3 of 6 units is not what it computes with the")


class Around(nn.Module):
    """A module whose row is built in, around the one of a registered row."""

    def __init__(self):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x):
        return self.ffn(x)


def test_layers_are_read_once(own_layouts):
    register_layout(FfnLayout(("0",), "2"))
    found = find_structures(nn.Sequential(Around()))
    assert [(s.name, len(s.members)) for s in found.structures] == [("0.ffn.2", 3)] and found.skipped == ()


def test_a_registered_attention_layout_is_found(own_layouts):
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.merge = layer.self_attn._modules.pop("o_proj")
    assert find_structures(model).of_kind("mha") == ()
    register_layout(MhaLayout(("q_proj", "k_proj", "v_proj"), ("merge",)))
    assert [s.name for s in find_structures(model).of_kind("mha")] == [
        f"model.layers.{n}.self_attn.merge" for n in (0, 1)
    ]


def test_of_rows_that_match_the_largest_is_taken_and_of_those_the_last_registered(own_layouts):
    small, first, last = (
        FfnLayout(("up_proj",), "down_proj", alone=True),
        FfnLayout(("gate_proj", "up_proj"), "down_proj", between=("a",)),
        FfnLayout(("gate_proj", "up_proj"), "down_proj", between=("b",)),
    )
    for row in (small, first, last):
        register_layout(row)
    rows = [row for row in layouts_of(FfnLayout) if row.second == "down_proj"]
    assert rows == [last, first, FFN_LAYOUTS[0], small, *FFN_LAYOUTS[1:4]]
    (network,) = find_structures(build("llama", num_hidden_layers=1)).of_kind("ffn")
    assert [m.tensor.split(".")[-2] for m in network.members] == ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("linear_in", "^A layout is needed, got 'linear_in': make an FfnLayout or an MhaLayout of"),
        (FfnLayout, "^A layout is needed, got <class .*FfnLayout'>: make an FfnLayout or an MhaLayout of"),
        (
            FfnLayout("enter", "leave"),
            r"^first of a layout must be a tuple of paths, got 'enter': one alone is written \(",
        ),
        (MhaLayout(("q", "k"), "o"), "^outputs of a layout must be a tuple of paths, got 'o'"),
        (FfnLayout(("enter",), ""), r"^second of a layout must be a tuple of paths, got \(''"),
        (MhaLayout((), ("o",)), r"^inputs of a layout must be a tuple of paths, got \(\)"),
        (FFN_LAYOUTS[1], r"^This layout is known already, leave the call out: FfnLayout\(first=\('gate_up_proj',\)"),
    ],
)
def test_what_is_no_layout_or_known_is_refused(layout, message, own_layouts):
    with pytest.raises(ValueError, match=message):
        register_layout(layout)
    assert layouts_of(FfnLayout)[0] is FFN_LAYOUTS[0]


def test_the_same_row_twice_is_refused(own_layouts):
    register_layout(ROW)
    with pytest.raises(ValueError, match="^This layout is known already, leave the call out"):
        register_layout(FfnLayout(("enter",), "leave"))
