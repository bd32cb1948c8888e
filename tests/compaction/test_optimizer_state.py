"""Which parts of an optimizer's state belong to which position of a parameter."""

import re

import pytest
import torch
from torch import nn
from transformers import Adafactor

from hf_slim.compaction.optimizer_state import find_state_slices, keep_state, zero_state
from hf_slim.parallel.whole_tensors import WholeTensors

PLACES = [("weight", 0), ("weight", 1), ("bias", 0)]
PLAIN = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "adamw": (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "fused": (lambda p: torch.optim.AdamW(p, fused=True), {"exp_avg", "exp_avg_sq"}),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
        {"square_avg", "grad_avg", "momentum_buffer"},
    ),
    "adagrad": (lambda p: torch.optim.Adagrad(p), {"sum"}),
}


def trained(make, shape=(6, 4)):
    """A layer `[outputs, inputs]` and its optimizer after two steps."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    optimizer = make(layer.parameters())
    for _ in range(2):
        layer(torch.randn(5, shape[1])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


@pytest.mark.parametrize("name", PLAIN)
def test_states_of_the_shape_of_the_parameter(name):
    make, keys = PLAIN[name]
    layer, optimizer = trained(make)
    slices, problems = find_state_slices(optimizer, layer, PLACES)
    assert problems == {}
    for place in PLACES:
        assert dict(slices[place]) == dict.fromkeys(keys, place[1])


def factored(parameters):
    return Adafactor(parameters, beta1=0.9, lr=0.1, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
def test_factored_states(shape):
    """The row factor has an element for each output, the column factor one for each input; square ones too."""
    layer, optimizer = trained(factored, shape)
    slices, problems = find_state_slices(optimizer, layer, PLACES)
    assert problems == {}
    assert dict(slices["weight", 0]) == {"exp_avg": 0, "exp_avg_sq_row": 0}
    assert dict(slices["weight", 1]) == {"exp_avg": 1, "exp_avg_sq_col": 0}
    state = {
        key: value.clone() for key, value in optimizer.state[layer.weight].items() if isinstance(value, torch.Tensor)
    }
    keep = torch.arange(shape[1]) % 2 == 0
    keep_state(optimizer, layer.weight, slices["weight", 1], keep)
    after = optimizer.state[layer.weight]
    assert torch.equal(after["exp_avg"], state["exp_avg"][:, keep])
    assert torch.equal(after["exp_avg_sq_col"], state["exp_avg_sq_col"][keep])
    assert torch.equal(after["exp_avg_sq_row"], state["exp_avg_sq_row"])


def test_factors_that_keep_their_dimensions():
    layer, optimizer = trained(torch.optim.Adafactor)
    slices, problems = find_state_slices(optimizer, layer, PLACES)
    assert problems == {}
    assert dict(slices["weight", 0]) == {"row_var": 0}
    assert dict(slices["weight", 1]) == {"col_var": 1}


def test_zeros_go_into_momentum_and_not_into_factors():
    layer, optimizer = trained(factored)
    slices, _ = find_state_slices(optimizer, layer, PLACES)
    factor = optimizer.state[layer.weight]["exp_avg_sq_col"].clone()
    zero_state(optimizer, layer.weight, slices["weight", 1], torch.tensor([1, 3]), WholeTensors())
    state = optimizer.state[layer.weight]
    assert (state["exp_avg"] != 0).any(0).tolist() == [True, False, True, False]
    assert torch.equal(state["exp_avg_sq_col"], factor)


class Odd(torch.optim.SGD):
    """Keeps one more state, which the test sets."""


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(6, 4, dtype=torch.uint8), r"torch.uint8 of shape \(6, 4\)"),
        (torch.zeros(24), r"torch.float32 of shape \(24,\)"),
        (object(), "a object"),
        ([torch.zeros(6, 4)], "a list"),
    ],
    ids=["codes", "flat", "object", "list"],
)
def test_what_cannot_be_sliced_is_named(state, message):
    layer, optimizer = trained(lambda p: Odd(p, lr=0.1, momentum=0.9))
    optimizer.state[layer.weight]["odd"] = state
    _, problems = find_state_slices(optimizer, layer, PLACES)
    assert set(problems) == {("weight", 0), ("weight", 1)}
    for problem in problems.values():
        assert re.fullmatch(rf"Odd keeps the state 'odd' \({message}\) for weight, which cannot be sliced .*", problem)


def test_a_square_factor_without_a_telling_name():
    layer, optimizer = trained(lambda p: Odd(p, lr=0.1), (5, 5))
    optimizer.state[layer.weight]["odd"] = torch.zeros(5)
    assert set(find_state_slices(optimizer, layer, PLACES)[1]) == {("weight", 0), ("weight", 1)}


def test_a_parameter_that_the_optimizer_does_not_hold():
    layer, _ = trained(torch.optim.SGD)
    optimizer = torch.optim.SGD([layer.bias], lr=0.1)
    assert find_state_slices(optimizer, layer, PLACES)[1] == {}  # it knows nothing of the weight
    optimizer = torch.optim.SGD([layer.weight.detach().clone(), layer.bias], lr=0.1)  # it steps on a copy
    assert find_state_slices(optimizer, layer, PLACES)[1] == {
        ("weight", 0): "SGD has no weight in its param_groups",
        ("weight", 1): "SGD has no weight in its param_groups",
    }


def test_numbers_frozen_parameters_and_no_optimizer_have_nothing():
    layer, optimizer = trained(lambda p: Odd(p, lr=0.1))
    optimizer.state[layer.weight].update(step=torch.tensor(3.0), count=2, name="x", none=None)
    layer.bias.requires_grad_(False)
    assert find_state_slices(optimizer, layer, PLACES) == ({place: [] for place in PLACES}, {})
    assert find_state_slices(None, layer, PLACES) == ({place: [] for place in PLACES}, {})
