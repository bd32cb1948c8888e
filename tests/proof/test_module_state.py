"""What is noted of a model is put back, whatever was done to it."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_slim.proof.module_state import Snapshot, leaving


class Block(nn.Module):
    """A module with everything that a module may have."""

    def __init__(self):
        super().__init__()
        self.config = PreTrainedConfig(sizes=[1, 2], inner=PreTrainedConfig(width=3))
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.count = 0

    def forward(self, x):
        self.count += 1
        self.cache = x
        return self.norm(self.layer(x))


class Other(Block):
    """The same of another class."""


def test_everything_but_values_is_put_back():
    block = Block()
    layer, weight, inner = block.layer, block.layer.weight, block.config.inner
    snapshot = Snapshot(block)
    block.__class__ = Other
    block.layer, block.extra, block.count = nn.Linear(3, 3), nn.Linear(1, 1), 5
    layer.weight = nn.Parameter(torch.zeros(1, 2))
    layer.register_forward_hook(print)
    block.register_buffer("more", torch.zeros(1))
    block.config.sizes.append(3)
    block.config.inner.width = 4
    block.config.inner = None
    snapshot.put_back()
    assert type(block) is Block
    assert block.layer is layer and layer.weight is weight and block.count == 0
    assert list(dict(block.named_children())) == ["layer", "norm"]
    assert dict(layer._forward_hooks) == {} and "more" not in dict(block.named_buffers())
    assert block.config.sizes == [1, 2] and block.config.inner is inner and inner.width == 3


def test_values_of_tensors_stay_changed():
    block = Block()
    snapshot = Snapshot(block)
    with torch.no_grad():
        block.layer.weight.fill_(7)
    snapshot.put_back()
    assert block.layer.weight.tolist() == [[7, 7], [7, 7]]


def test_a_forward_pass_leaves_nothing():
    block = Block().train()
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    with leaving(block):
        block(torch.arange(8.0).view(4, 2))
        assert block.count == 1 and block.norm.num_batches_tracked == 1
        block.eval()
    assert block.count == 0 and not hasattr(block, "cache") and block.training and block.norm.training
    assert {name: buffer.tolist() for name, buffer in block.named_buffers()} == {
        name: buffer.tolist() for name, buffer in before.items()
    }


def test_an_error_leaves_nothing_either():
    block = Block()
    with pytest.raises(ZeroDivisionError), leaving(block):
        block.count = 1 / 0 if block.eval() is block else 0
    assert block.training and block.count == 0
