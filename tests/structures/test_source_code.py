"""What a module's code reads, and the widths that it is made to infer."""

import pytest
import torch
from torch import nn

from hf_slim.modeling_hf_slim import can_infer, infer_widths, written_class
from hf_slim.structures.source_code import find_reads


class Ending(nn.Module):
    """Attention that ends with the width of its input."""

    def __init__(self, heads=4):
        super().__init__()
        self.num_heads, self.unread = heads, 7
        self.value, self.out_proj = nn.Linear(8, 2 * heads), nn.Linear(2 * heads, 8)

    def forward(self, x):
        batch, length, embed_dim = x.shape
        heads = self.value(x).view(batch, length, self.num_heads, 2)
        return self.out_proj(heads.flip(1).reshape(batch, length, embed_dim))


class Fixed(Ending):
    """The same where the width cannot be inferred, because another size is."""

    def forward(self, x):
        batch, length, embed_dim = x.shape
        return self.out_proj(self.value(x).reshape(batch, -1, embed_dim))


def test_reads():
    reads = find_reads(Ending)
    assert {"num_heads", "value", "out_proj"} == reads.names
    assert reads.used == {"value", "out_proj"}  # num_heads only shapes a result
    assert reads.arguments == ("self", "x")
    assert reads.input_width == "embed_dim"


def test_a_class_made_at_run_time_around_another_is_read_like_that():
    assert find_reads(type("Wrapped", (Ending,), {})).names == find_reads(Ending).names
    assert find_reads(type("Own", (Ending,), {"forward": lambda self, x: x})).names is None


def test_widths_are_inferred():
    module, x = Ending(), torch.randn(2, 3, 8)
    expected = module(x)
    infer_widths(module)
    infer_widths(module)
    assert torch.equal(module(x), expected)
    assert isinstance(module, Ending) and type(module).__name__ == "Ending"
    assert written_class(type(module)) is Ending
    assert find_reads(type(module)) == find_reads(Ending)
    small = Ending(heads=2)
    with pytest.raises(RuntimeError, match="shape"):
        small(x)
    infer_widths(small)
    assert small(x).shape == (2, 3, 8)


def test_a_second_size_that_is_inferred_is_in_the_way():
    assert can_infer(Ending) and not can_infer(Fixed)
