"""Reading whole modules, function by function."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_slim.structures.custom_code.axes import UnreadableError
from hf_slim.structures.custom_code.dataflow import read_flow
from hf_slim.structures.feed_forward import read_ffn
from hf_slim.structures.layout_rows import FfnLayout


class Network(nn.Module):
    """A feed-forward network of six channels, and what several forwards need."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.act, self.parts, self.flag = nn.GELU(), nn.ModuleList([nn.ReLU(), nn.Tanh()]), True


def read(function):
    kind = type("Made", (Network,), {"forward": function, "__module__": __name__})
    module = kind()
    read_flow(module, read_ffn(module, FfnLayout(("fc1",), "fc2")))


def chain(self, x):
    return self.fc2(self.act(self.fc1(x)))


def named(self, x, scale: float = 2.0):
    hidden = F.gelu(self.fc1(x), approximate="tanh")
    hidden *= scale
    return self.fc2(hidden), None


def branches(self, x, mask=None):
    hidden = self.fc1(x)
    if self.flag:
        hidden = hidden.relu()
    else:
        hidden = hidden.softmax(-1)
    if mask is not None:
        hidden = hidden * 2
    return self.fc2(hidden)


def loop(self, x):
    hidden = self.fc1(x)
    for part in self.parts:
        hidden = part(hidden)
    both = [hidden * number for number in (1, 2)]
    return self.fc2(both[0])


def helped(self, x):
    return self.fc2(_help(self.fc1(x), power=2))


def _help(hidden, power):
    return hidden.relu() ** power


@pytest.mark.parametrize("function", [chain, named, branches, loop, helped])
def test_code_that_treats_channels_by_themselves(function):
    read(function)


def softmax(self, x):
    return self.fc2(self.fc1(x).softmax(-1))


def width(self, x):
    hidden = self.fc1(x)
    return self.fc2(hidden / hidden.shape[-1])


def skipping(self, x):
    self.fc1(x)
    return x


def other(self, x):
    return self.fc1(x)


def spread(self, x):
    hidden = self.fc1(x)
    return self.fc2(torch.cat([hidden, *hidden]))


def conflict(self, x, y):
    hidden = self.fc1(x)
    if y:
        hidden = hidden.transpose(1, 2)
    return self.fc2(hidden)


def stored(self, x):
    other = torch.zeros(3)
    other[0] = self.fc1(x)
    return self.fc2(other)


def several(self, x):
    hidden = self.fc1(x)
    return self.fc2([h for h in hidden for _ in h])


def gone(self, x):
    with torch.no_grad():
        try:
            return self.fc2(self.fc1(x))
        finally:
            pass


def parent(self, x):
    return super().forward(self.fc1(x))


def indexed(self, x):
    return self.fc2(self.fc1(x)[..., :3])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (softmax, r"^goes over the dimension along which the units lie \(in softmax: return self.fc2"),
        (width, r"^calculates with a number that depends on how many units there are \(in width: return"),
        (skipping, r"^the code of Made does not call fc2$"),
        (other, "^the code of Made gives more than its last layer makes$"),
        (spread, "^spreads what depends on units "),
        (conflict, "^hidden means different things after different branches "),
        (stored, "^stores units in another tensor "),
        (several, "^a comprehension of several loops cannot be read "),
        (gone, r"^Try cannot be read \(in gone: try:\)$"),
        (parent, r"^calls super\(\), which is not followed "),
        (indexed, "^takes some of the units "),
    ],
)
def test_other_code_is_refused_with_the_line(function, reason):
    with pytest.raises(UnreadableError, match=reason):
        read(function)
