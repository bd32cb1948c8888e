"""Everything is computed in the wider type, and nothing of the model is touched."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_slim.proof.higher_precision import is_narrow, widened


class Model(nn.Module):
    """A layer, a cast to a narrower type, and numbers that are made in it."""

    def __init__(self):
        super().__init__()
        self.config = PreTrainedConfig()
        self.layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1 / 3, 2 / 3], [1.0, -1.0]]))

    def forward(self, x):
        y = self.layer(x.to(self.layer.weight.dtype))
        return y.half() + torch.full((2,), 1e-5, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_outputs_are_those_of_a_wider_copy(dtype):
    model = Model().half()
    weight, x = model.layer.weight, torch.tensor([[0.1, 0.7]], dtype=torch.float16)
    with torch.no_grad(), widened(model, dtype):
        output = model(x)
    assert output.dtype == dtype
    assert torch.equal(output, x.to(dtype) @ weight.detach().to(dtype).T + torch.tensor(1e-5, dtype=dtype))
    assert model.layer.weight is weight and weight.dtype == torch.float16
    assert model(x).dtype == torch.float16


def test_what_is_written_to_keeps_its_type():
    model, target = nn.Module(), torch.zeros(3, dtype=torch.float16)
    with widened(model, torch.float32):
        wide = torch.ones(3, dtype=torch.float16) / 3
        target.add_(wide)
        assert target[1:].dtype == torch.float16  # a view is no new tensor
    assert (wide.dtype, target.dtype) == (torch.float32, torch.float16)
    assert target.tolist() == [0.333251953125] * 3


def test_whole_numbers_and_wide_ones_stay():
    with widened(nn.Module(), torch.float32):
        assert (torch.arange(3) + 1).dtype == torch.int64
        assert torch.ones(1, dtype=torch.float64).mul(2).dtype == torch.float64


def test_groups_are_multiplied_one_by_one():
    rows = torch.arange(8, dtype=torch.bfloat16).view(4, 2)
    weights = torch.tensor([[[1, 0], [0, 1]], [[0, 2], [2, 0]]], dtype=torch.bfloat16)
    with widened(nn.Module(), torch.float32):
        result = torch.ops.aten._grouped_mm(rows, weights, torch.tensor([1, 3], dtype=torch.int32))
    assert result.dtype == torch.float32
    assert result.tolist() == [[0, 1], [6, 4], [10, 8], [0, 0]]


def test_kernels_of_half_precision_are_not_used_meanwhile():
    model = nn.Module()
    model.outer, model.inner = nn.Module(), nn.Module()
    for part, name in ((model.outer, "flash_attention_2"), (model.inner, "eager")):
        part.config = PreTrainedConfig()
        part.config._attn_implementation = name

    def names():
        return [part.config._attn_implementation for part in (model.outer, model.inner)]

    with pytest.raises(KeyError), widened(model, torch.float32):
        assert names() == ["sdpa", "eager"]
        raise KeyError
    assert names() == ["flash_attention_2", "eager"]


@pytest.mark.parametrize(
    ("weights", "inputs", "dtype", "narrow"),
    [
        (torch.float32, torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float32, torch.float32, True),
        (torch.float32, torch.float16, torch.float32, True),
        (torch.float64, torch.int64, torch.float32, False),
        (torch.float64, torch.float64, torch.float64, True),
    ],
)
def test_what_is_narrow(weights, inputs, dtype, narrow):
    model = nn.Linear(1, 1).to(weights)
    assert is_narrow(model, {"x": torch.zeros(1, dtype=inputs), "flag": True}, dtype) is narrow


def test_a_model_that_accelerate_runs_in_half_precision_is_narrow():
    model = nn.Linear(1, 1)
    model._original_forward = model.forward
    assert is_narrow(model, {}, torch.float32)
