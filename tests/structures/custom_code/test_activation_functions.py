"""Activations by numbers."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_slim.structures.custom_code.activation_functions import (
    InconclusiveError,
    calm,
    find_mixed,
    is_elementwise,
    is_plain_function,
)


@pytest.mark.parametrize("function", [torch.relu, nn.GELU(), ACT2FN["quick_gelu"], nn.Dropout(0.5), lambda x: x * 2])
def test_functions_of_each_element(function):
    assert find_mixed(function) is None and is_elementwise(function)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nn.Softmax(-1), "makes channels depend on one another"),
        (nn.LayerNorm(8, elementwise_affine=False), "makes channels depend on one another"),
        (nn.GLU(), r"makes (4, 6, 4) of (4, 6, 8)"),
    ],
)
def test_functions_that_mix(function, reason):
    assert find_mixed(function) == reason and not is_elementwise(function)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (nn.PReLU(), "^it has parameters$"),
        (torch.add, "^it cannot be called with a tensor$"),
        (lambda x: 3, "^it gives no tensor$"),
    ],
)
def test_what_says_nothing(function, reason):
    with pytest.raises(InconclusiveError, match=reason):
        find_mixed(function)
    assert not is_elementwise(function)


def test_plain_functions_depend_on_what_they_are_given():
    bound = 3
    assert is_plain_function(len) and is_plain_function(find_mixed)
    assert not is_plain_function(lambda x: x + bound) and not is_plain_function(nn.ReLU())


def test_random_numbers_are_the_same_each_time_and_leave_those_of_others():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with calm():
        first = torch.rand(3)
    with calm():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(2), expected)
