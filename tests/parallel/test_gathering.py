"""Sharded models are put together with the values that they had; others are left as they are."""

import pytest
import torch
from conftest import build, logits, make_batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.integrations import deepspeed

from hf_slim.parallel.gathering import build_whole, gather_weights, is_first_process, is_spread, run_in_first_process
from hf_slim.parallel.sharded_tensors import is_sharded


@pytest.fixture
def sharded(group):
    """A model over a process group of one; its values, and what it computed before."""
    model = build("bert")
    expected = logits(model, make_batch(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model, before, expected


@pytest.mark.parametrize("is_used", [False, True])
def test_a_sharded_model_is_put_together(sharded, is_used):
    model, before, expected = sharded
    if is_used:  # FSDP2 leaves what belongs to no layer whole after a forward pass
        assert torch.equal(logits(model, make_batch(model)), expected)
    assert is_spread(model) and any(map(is_sharded, model.parameters())) is not is_used
    weights = gather_weights(model)
    assert weights.keys() == before.keys()
    assert all(type(weights[name]) is torch.Tensor and torch.equal(weights[name], before[name]) for name in before)
    whole = build_whole(model.train(), weights)
    assert type(whole) is type(build("bert")) and not is_spread(whole) and whole.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*whole.parameters(), *whole.buffers()))
    assert whole.config is not model.config
    assert torch.equal(logits(whole.eval(), make_batch(whole)), expected)


def test_tied_weights_stay_tied(group):
    model = build("gpt2")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    whole = build_whole(model, gather_weights(model))
    assert whole.lm_head.weight is whole.transformer.wte.weight
    assert whole.generation_config == model.generation_config is not whole.generation_config


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="A sharded Linear cannot be put together: only a PreTrainedModel without ad"):
        gather_weights(nn.Linear(2, 2))


def test_parameters_that_deepspeed_took_apart_are_spread():
    layer = nn.Linear(2, 2)
    assert not is_spread(layer)
    layer.bias.ds_id = 0
    assert is_spread(layer)


def test_one_process_runs_a_function_itself():
    assert is_first_process()
    assert run_in_first_process(lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        run_in_first_process(lambda: 1 / 0)


class Stage3:
    """A config of DeepSpeed, as transformers keeps it."""

    config = {"zero_optimization": {"stage": 3}}

    def is_zero3(self):
        """It is."""
        return True


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_loaded_whole_in_the_first_process(group, fails):
    config = Stage3()
    deepspeed.set_hf_deepspeed_config(config)
    seen = []

    def load():
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return 1 / 0 if fails else "loaded"

    try:
        if fails:
            with pytest.raises(ZeroDivisionError):
                run_in_first_process(load)
        else:
            assert run_in_first_process(load) == "loaded"
        assert seen == [False] and deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.deepspeed_config() is config.config
    finally:
        deepspeed.unset_hf_deepspeed_config()
