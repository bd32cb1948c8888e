"""What one forward pass costs before and after, where that is quickly found."""

import copy

import pytest
import torch
from conftest import build
from sparse_models import masked

from hf_slim import find_structures, model_slim
from hf_slim.costs import Skeleton, find_forward_costs, make_small_skeleton
from hf_slim.costs import forward_costs as costs

# 128 tokens, 2 layers: q, k, v, o of 32x32, two products of attention, two layers 32x64; the pooler, two labels once.
LAYER = 128 * (4 * 32 * 32 + 2 * 32 * 128 + 2 * 32 * 64)
DENSE = 2 * (2 * LAYER + 32 * 32 + 2 * 32)


def find(model):
    """The costs of a masked model and its slim copy; half of all units are zero."""
    structures = find_structures(model).structures
    skeleton = make_small_skeleton(model, structures, {})
    slim = model_slim(copy.deepcopy(model), round_multiplier=1)
    return find_forward_costs(skeleton, slim, {s.name: s.units // 2 for s in structures})


def test_operations_are_counted_and_passes_timed(monkeypatch):
    monkeypatch.setattr(costs, "_SECONDS", 1e9)
    monkeypatch.setattr(costs, "_MOST", 3)
    found = find(masked())
    assert (found.flops_before, found.flops_after) == (DENSE, DENSE - 2 * LAYER)
    assert found.milliseconds_before > 0 and found.milliseconds_after > 0
    assert found.machine.endswith(f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")


def test_what_takes_long_is_not_timed(monkeypatch):
    monkeypatch.setattr(costs, "_SECONDS", 0.0)
    why = "The latency is not known: a few passes take longer than 0.0 s."
    assert find(masked()) == (DENSE, DENSE - 2 * LAYER, None, None, "", why)


def test_large_models_and_other_modules_are_left_alone(monkeypatch):
    model = build("bert")
    structures = find_structures(model).structures
    why = make_small_skeleton(torch.nn.Linear(2, 2), (), {})
    assert why == "it holds no transformers model, so that no inputs can be made for it"
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for largest, is_small in ((size, True), (size - 1, False)):
        monkeypatch.setattr(costs, "_LARGEST", largest)
        assert isinstance(make_small_skeleton(model, structures, {}), Skeleton) is is_small
    why = make_small_skeleton(model, structures, {})
    assert why == "the dense model has more than 0.0 GB"
    told = f"Operations and latency are not known: {why}."
    assert find_forward_costs(why, model, {}) == (None, None, None, None, "", told)


def test_a_model_that_cannot_be_run_has_no_costs(monkeypatch):
    def fail(*arguments):
        raise ValueError("X takes audio, for which no input can be made: pass a batch of yours, verify={...}.\nMore.")

    monkeypatch.setattr(costs, "make_batches", fail)
    why = "the model cannot be run by itself on made inputs (X takes audio, for which no input can be made)"
    assert find(masked()) == (None, None, None, None, "", f"Operations and latency are not known: {why}.")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_machine_is_named(device):
    assert costs.name_machine(torch.device(device))
