"""Whose code is tried, and what is said of it."""

from functools import partial

import pytest
import torch
from conftest import build
from torch import nn

from hf_slim.structures.custom_code import mixing_check
from hf_slim.structures.custom_code.activation_functions import InconclusiveError
from hf_slim.structures.custom_code.mixing_check import find_hook, find_strange
from hf_slim.structures.discovery import find_structures


class Relu(nn.Module):
    """An activation of a stranger's."""

    def forward(self, x):
        return x.relu()


def strange(change=lambda model: None, find=find_strange):
    """What is said of the first network of a BERT after a change."""
    model = build("bert")
    structure = next(s for s in find_structures(model).structures if s.kind == "ffn")
    change(model.bert.encoder.layer[0])
    return find(model, "bert.encoder.layer.0", structure)


def test_code_of_transformers_is_not_tried(monkeypatch):
    monkeypatch.setattr(mixing_check, "probe_module", lambda module, structure: "tried")
    assert strange() is None
    assert strange(lambda layer: setattr(layer.intermediate, "intermediate_act_fn", Relu())) == "tried"


def test_hooks_are_in_the_way():
    def scale(module, inputs, output):
        return output * 2

    reason = strange(lambda layer: layer.output.dense.register_forward_hook(scale), find_hook)
    path = "bert.encoder.layer.0.output.dense"
    assert reason.startswith(f"a hook on {path} (test_hooks_are_in_the_way.<locals>.scale) may change what goes")
    reason = strange(lambda layer: layer.intermediate.register_forward_pre_hook(partial(scale, None)), find_hook)
    assert reason.startswith("a hook on bert.encoder.layer.0.intermediate (partial) may change what goes through it")
    assert strange(find=find_hook) is None


def test_an_activation_that_mixes_is_named_when_nothing_else_is_known(monkeypatch):
    def fail(module, structure):
        raise InconclusiveError("it cannot be run")

    monkeypatch.setattr(mixing_check, "probe_module", fail)
    act = "its activation intermediate.intermediate_act_fn is no function of each element"
    reason = strange(lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.Softmax(-1)))
    assert reason == f"{act}: it makes channels depend on one another"
    assert strange(lambda layer: setattr(layer.intermediate, "intermediate_act_fn", Relu())) is None  # read


@pytest.mark.parametrize(("kind", "known"), [(nn.Linear, True), (Relu, False), (nn.Module, True)])
def test_known_classes(kind, known):
    assert mixing_check._is_known_class(kind) is known


def test_a_forward_of_ones_own_is_not_known():
    module = nn.ReLU()
    assert mixing_check._is_known(module)
    module.forward = partial(torch.relu)
    assert mixing_check._is_known(module) is True
    module.forward = lambda x: x
    assert mixing_check._is_known(module) is False
