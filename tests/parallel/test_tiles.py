"""Sums, zeros and copies along one dimension, for every dimension, type and size."""

import pytest
import torch

from hf_slim.parallel import tiles
from hf_slim.parallel.tiles import find_nonzero, sum_tiles, take_positions

SHAPES = [(7,), (6, 10), (5, 4, 3), (1, 9), (9, 1), (5, 12, 1, 1)]
CASES = [(shape, dim) for shape in SHAPES for dim in range(len(shape))]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a row or two, so that there are several."""
    monkeypatch.setattr(tiles, "_CPU_TILE", 12)


def whole(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_sums(shape, dim, dtype):
    one, other = whole(shape, dtype), whole(shape, dtype, seed=1)
    others = [d for d in range(len(shape)) if d != dim]
    for function in (torch.mul, lambda a, b: (a * b).abs()):
        expected = function(one.double(), other.double())
        expected = expected.sum(others) if others else expected
        actual = sum_tiles(dim, function, one, other)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_zeros(shape, dim, dtype):
    tensor = torch.zeros(shape).to(dtype)
    assert not find_nonzero(dim, tensor).any()
    for value in (1.0, -1.0, float("nan")):
        changed = tensor.float().clone()
        last = changed.select(dim, shape[dim] - 1)
        last[(0,) * last.dim()] = value
        expected = torch.arange(shape[dim]) == shape[dim] - 1
        assert torch.equal(find_nonzero(dim, changed.to(dtype)), expected)


def test_the_smallest_number_is_not_zero():
    tensor = torch.zeros(2, 3)
    tensor[1, 2] = torch.finfo(torch.float32).smallest_normal / 2**23
    assert find_nonzero(1, tensor).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_copies(shape, dim, block, dtype):
    tensor = whole(shape).to(dtype)
    keep = torch.rand(-(-shape[dim] // block), generator=torch.Generator().manual_seed(3)) < 0.6
    keep[0] = True
    keep = keep.repeat_interleave(block)[: shape[dim]]
    expected = tensor.index_select(dim, keep.nonzero().flatten())
    for memory in (tensor, tensor.transpose(0, -1).contiguous().transpose(0, -1)):
        taken = take_positions(memory, dim, keep)
        assert torch.equal(taken.double(), expected.double()) and taken.dtype == dtype
        assert taken.is_contiguous()
        assert taken.untyped_storage().nbytes() == taken.numel() * taken.element_size()
    assert take_positions(tensor.to("meta"), dim, keep).shape == taken.shape


def test_a_small_tensor_elsewhere_than_on_a_cpu_is_one_tile_and_a_large_one_never():
    for device, shape, rows in (
        ("meta", (1024, 4096), 1024),
        ("meta", (1025, 4096), 257),
        ("meta", (0, 8), 1),
        ("cpu", (4, 1), 1),
    ):
        assert tiles._rows_of_a_tile(torch.empty(shape, device=device)) == rows
