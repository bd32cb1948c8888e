"""What counts as a linear layer."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_slim.structures.linear_layers import (
    Layer,
    find_child,
    find_layer,
    find_tensor,
    join,
    layer_of,
    tensors_outside,
)
from hf_slim.structures.structure import blocks


class Holder(nn.Module):
    """Layers of every sort."""

    def __init__(self):
        super().__init__()
        self.plain, self.bare = nn.Linear(3, 5), nn.Linear(3, 5, bias=False)
        self.turned = Conv1D(5, 3)
        self.conv = nn.Conv2d(4, 6, 1, groups=2)
        self.wrapped = nn.ModuleDict({"linear": nn.Linear(3, 5)})
        self.stack = nn.Parameter(torch.zeros(2, 5, 3))
        self.stack_bias = nn.Parameter(torch.zeros(2, 5))
        self.matrix = nn.Parameter(torch.zeros(5, 3))
        self.norm, self.table = nn.LayerNorm(3), nn.Embedding(3, 5)
        self.adapted = nn.Module()
        self.adapted.base_layer = nn.Linear(3, 5)
        self.adapted.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.adapted.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})


PAIR = ("adapted.lora_A.default.weight", "adapted.lora_B.default.weight")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("plain", Layer("plain.weight", "plain.bias", 3, 5, 1, 0)),
        ("bare", Layer("bare.weight", None, 3, 5, 1, 0)),
        ("turned", Layer("turned.weight", "turned.bias", 3, 5, 0, 1)),
        ("conv", Layer("conv.weight", "conv.bias", 4, 6, 1, 0, groups=2)),
        ("wrapped", Layer("wrapped.linear.weight", "wrapped.linear.bias", 3, 5, 1, 0)),
        ("stack", Layer("stack", "stack_bias", 3, 5, 2, 1, bias_dim=1)),
        ("adapted", Layer("adapted.base_layer.weight", "adapted.base_layer.bias", 3, 5, 1, 0, adapters=(PAIR,))),
        *((name, None) for name in ("matrix", "norm", "table", "missing", "missing.deeper", "plain.weight")),
    ],
)
def test_layers(path, layer):
    assert find_layer(Holder(), path) == layer


def test_experts_may_have_their_inputs_first():
    assert find_layer(Holder(), "stack", swapped=True) == Layer("stack", "stack_bias", 5, 3, 1, 2, bias_dim=1)


def test_members_on_either_side():
    layer = find_layer(Holder(), "adapted")
    index = blocks(1, 3)
    assert [(m.tensor, m.dim, m.role) for m in layer.members(index, "output")] == [
        ("adapted.base_layer.weight", 1, "output"),
        (PAIR[0], 1, "adapter"),
    ]
    assert [(m.tensor, m.dim, m.role) for m in layer.members(index, "input")] == [
        ("adapted.base_layer.weight", 0, "input"),
        ("adapted.base_layer.bias", 0, "extra"),
        (PAIR[1], 0, "extra"),
    ]


def test_paths():
    holder = Holder()
    assert find_child(holder, "") is holder and find_child(holder, "wrapped.linear") is holder.wrapped["linear"]
    assert find_child(holder, "wrapped.other.linear") is None
    assert find_tensor(holder, "plain.weight") is holder.plain.weight and find_tensor(holder, "no.weight") is None
    assert join("a", "", "b.c") == "a.b.c"
    assert (
        layer_of("a.fc1.base_layer.weight") == layer_of("a.fc1.linear.weight") == layer_of("a.fc1.weight") == "a.fc1"
    )


def test_tensors_that_nothing_explains():
    explained = ("plain", "bare", "turned", "conv", "wrapped", "stack", "adapted", "norm")
    assert [name for name, _ in tensors_outside(Holder(), explained)] == ["matrix", "table.weight"]
