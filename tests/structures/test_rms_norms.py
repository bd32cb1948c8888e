"""Which norms can be folded, and that folding is exact."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_slim.structures.rms_norms import find_epsilon, fold_norm


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (LlamaRMSNorm(6), "variance_epsilon"),
        (nn.RMSNorm(6, eps=1e-6), "eps"),
        (nn.RMSNorm(6), None),  # an epsilon that depends on the type of the numbers
        (Gemma2RMSNorm(6), None),  # adds one to its weight
        (nn.LayerNorm(6), None),
        (nn.LayerNorm(6, bias=False), None),
        (nn.BatchNorm1d(6), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_be_folded(norm, name):
    before = [tensor.clone() for tensor in norm.state_dict().values()]
    assert find_epsilon(norm) == name
    assert find_epsilon(norm.to("meta")) == name
    assert [tensor.shape for tensor in norm.state_dict().values()] == [tensor.shape for tensor in before]


def test_folding_is_exact():
    norm = LlamaRMSNorm(6, eps=0.1)
    nn.init.normal_(norm.weight)
    member, count = fold_norm("a.norm", norm, "variance_epsilon", 3)
    assert (member.tensor, member.dim, member.role) == ("a.norm.weight", 0, "norm")
    assert member.index.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (count.module, count.attribute) == ("a.norm", "variance_epsilon")
    assert count.value(3) == pytest.approx(0.1) and count.value(2) == pytest.approx(0.15)
    values = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    values[:, 4:] = 0
    small = LlamaRMSNorm(4, eps=count.value(2))
    small.weight.data = norm.weight.data[:4] * (3 / 2) ** 0.5
    assert torch.allclose(small(values[:, :4]), norm(values)[:, :4], atol=1e-6)
