"""Trying a module on a small copy."""

import pytest
import torch
from torch import nn

from hf_slim.structures.custom_code import numeric_trial
from hf_slim.structures.custom_code.activation_functions import InconclusiveError
from hf_slim.structures.custom_code.numeric_trial import probe_module, relative
from hf_slim.structures.feed_forward import read_ffn
from hf_slim.structures.layout_rows import FfnLayout
from hf_slim.structures.structure import Count

ROW = FfnLayout(("fc1",), "fc2")


class Network(nn.Module):
    """A feed-forward network of six channels."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Softmaxed(Network):
    """Its channels depend on one another."""

    def forward(self, x):
        return self.fc2(self.fc1(x).softmax(-1))


class Counting(Network):
    """Its code knows how many channels there are."""

    def forward(self, x):
        return self.fc2(self.fc1(x).view(-1, 6))


class Asking(Network):
    """It wants what nobody can guess."""

    def forward(self, x, key):
        return self.fc2(self.fc1(x) + key["offset"])


class Idle(Network):
    """It makes nothing of its layers."""

    def forward(self, x):
        return x


class Quantized(Network):
    """Its weights are whole numbers."""

    def __init__(self):
        super().__init__()
        self.fc1.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)


def probe(module):
    return probe_module(module, read_ffn(module, ROW))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_verdicts(device):
    with torch.device(device):
        assert probe(Network()) is None
        assert probe(Softmaxed()).startswith(
            "what it computes with 3 of 6 units is not what it computes with the others"
        )
        assert probe(Counting()).startswith("its code fails with 3 of 6 units (RuntimeError: ")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Asking(), "^it cannot be run on hidden states alone$"),
        (Idle(), "^its output does not depend on the layers in it$"),
        (Quantized(), "^its weights are not stored as plain numbers$"),
    ],
    ids=["asking", "idle", "stored"],
)
def test_what_says_nothing(module, reason):
    with pytest.raises(InconclusiveError, match=reason):
        probe(module)


def test_of_a_large_module_some_channels_are_tried(monkeypatch):
    monkeypatch.setattr(numeric_trial, "_LIMIT", 40)
    monkeypatch.setattr(numeric_trial, "_proven", {})
    assert probe(Network()) is None
    assert probe(Softmaxed()).startswith("what it computes with 2 of 4 units")
    monkeypatch.setattr(numeric_trial, "_LIMIT", 3)
    monkeypatch.setattr(numeric_trial, "_proven", {})
    with pytest.raises(InconclusiveError, match="^it is too large to be tried$"):
        probe(Network())


def test_a_module_like_another_is_not_run_again(monkeypatch):
    monkeypatch.setattr(numeric_trial, "_proven", {})
    assert probe(Network()) is None
    monkeypatch.setattr(numeric_trial, "_probe", lambda module, structure: "tried again")
    assert probe(Network()) is None
    assert probe(nn.Sequential().append(Network())[0].double()) is None
    assert probe(Softmaxed()) == "tried again"


def test_the_module_itself_is_left_alone():
    module = Network().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe(module)
    assert module.training and module.fc1.out_features == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_names_relative_to_a_module():
    structure = read_ffn(Network(), ROW).rename(lambda name: f"a.b.{name}".rstrip("."))
    structure = structure.rename(lambda name: name)
    assert structure.name == "a.b.fc2"
    inner = relative(structure, "a.b")
    assert inner.name == "fc2" and [m.tensor for m in inner.members] == ["fc1.weight", "fc1.bias", "fc2.weight"]
    assert relative(structure, "a").members[0].tensor == "b.fc1.weight" and relative(structure, "") is structure
    counted = type(structure)("a.fc2", "ffn", 6, (), (Count("a", "width", 1),), ("a",))
    assert relative(counted, "a").counts == (Count("", "width", 1),) and relative(counted, "a").reshaping == ("",)
