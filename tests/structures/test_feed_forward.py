"""From feed-forward networks to members, index by index, and to the reasons not to."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_slim.structures.feed_forward import matches_ffn, read_ffn
from hf_slim.structures.layout_rows import FfnLayout
from hf_slim.structures.structure import UnaccountedError

PLAIN = FfnLayout(("fc1",), "fc2", between=("between",))


class Network(nn.Module):
    """Three channels, or six with the gate in front, between hidden states of size 4."""

    def __init__(self, made=3, between=None, bias=True):
        super().__init__()
        self.intermediate_size = 3
        self.fc1, self.fc2 = nn.Linear(4, made, bias=bias), nn.Linear(3, 4)
        if between is not None:
            self.between = between

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Experts(nn.Module):
    """Stacked experts: two of three channels."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 3))

    def forward(self, x):
        return x


def parts(structure):
    return [(m.tensor, m.dim, m.role, m.index.tolist()) for m in structure.members]


def test_each_channel_owns_a_row_and_a_column():
    structure = read_ffn(Network(), PLAIN)
    channel = [[0], [1], [2]]
    assert (structure.name, structure.kind, structure.units) == ("fc2", "ffn", 3)
    assert parts(structure) == [
        ("fc1.weight", 0, "input", channel),
        ("fc1.bias", 0, "extra", channel),
        ("fc2.weight", 1, "output", channel),
    ]
    assert [(c.module, c.attribute, c.value(2)) for c in structure.counts] == [("", "intermediate_size", 2)]


@pytest.mark.parametrize(
    ("concatenated", "rows"), [(True, [[0, 3], [1, 4], [2, 5]]), (False, [[0, 1], [2, 3], [4, 5]])]
)
def test_a_layer_that_makes_gate_and_up(concatenated, rows):
    module = Network(6, bias=False)
    module.is_concatenated = concatenated
    assert parts(read_ffn(module, PLAIN))[0] == ("fc1.weight", 0, "input", rows)


def test_stacked_experts_lose_the_same_channels_in_multiples_of_16_bytes():
    structure = read_ffn(Experts(), FfnLayout(("gate_up_proj",), "down_proj"))
    assert parts(structure) == [
        ("gate_up_proj", 1, "input", [[0, 3], [1, 4], [2, 5]]),
        ("down_proj", 2, "output", [[0], [1], [2]]),
    ]
    assert structure.multiple == 4


def test_a_depthwise_convolution_between_goes_along():
    structure = read_ffn(Network(between=nn.Conv1d(3, 3, 5, groups=3)), PLAIN)
    assert parts(structure)[2:4] == [(f"between.{leaf}", 0, "extra", [[0], [1], [2]]) for leaf in ("weight", "bias")]


def test_an_rms_norm_between_is_folded():
    structure = read_ffn(Network(between=LlamaRMSNorm(3, eps=1e-3)), PLAIN)
    assert parts(structure)[2] == ("between.weight", 0, "norm", [[0], [1], [2]])
    epsilon = structure.counts[0]
    assert (epsilon.module, epsilon.attribute) == ("between", "variance_epsilon")
    assert epsilon.value(1) == pytest.approx(3e-3)


def test_a_row_that_stands_alone_matches_nothing_with_other_tensors():
    alone = FfnLayout(("fc1",), "fc2", alone=True)
    assert matches_ffn(Network(), alone) and not matches_ffn(Network(between=nn.LayerNorm(3)), alone)
    assert not matches_ffn(Network(), FfnLayout(("fc1", "fc3"), "fc2"))


class Averaging(Network):
    """A network whose code goes over its channels."""

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(hidden - hidden.mean(-1, keepdim=True))


class Counting(Network):
    """A network whose code reads the number of channels under a name of its own."""

    def __init__(self):
        super().__init__()
        self.my_size = 3

    def forward(self, x):
        return self.fc2(self.fc1(x) / self.my_size)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Network(5), "^fc1 make 5 channels, but fc2 reads 3$"),
        (Network(between=nn.LayerNorm(3)), "^between normalizes the 3 intermediate channels together, not as an RMS"),
        (
            Network(between=nn.Conv1d(3, 3, 5)),
            "^between is not a depthwise convolution of the 3 intermediate channels",
        ),
        (Averaging(), "^its code calls mean, so that channels may depend on one another$"),
        (Counting(), "^its code reads my_size = 3, which may count the intermediate channels$"),
    ],
    ids=["sizes", "norm", "convolution", "mean", "count"],
)
def test_what_nothing_explains_is_refused(module, reason):
    with pytest.raises(UnaccountedError, match=reason):
        read_ffn(module, PLAIN)


def test_a_tensor_of_their_size_is_refused():
    module = Network()
    module.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(UnaccountedError, match=r"^scale of shape \(3,\) may depend on the 3 intermediate channels"):
        read_ffn(module, PLAIN)
