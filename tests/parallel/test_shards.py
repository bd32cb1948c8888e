"""Where weights and gradients are: what is chosen, and what it answers where every tensor is whole."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_slim.parallel import deepspeed_zero
from hf_slim.parallel.deepspeed_zero import ZeroPartitions
from hf_slim.parallel.sharded_tensors import ShardedTensors, is_sharded
from hf_slim.parallel.shards import find_shards
from hf_slim.parallel.whole_tensors import WholeTensors

WEIGHT = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, -6.0]])
GRADIENT = torch.tensor([[1.0, 1.0, -1.0], [0.5, 2.0, 0.0]])
PLACES = [("weight", 0), ("weight", 1)]


@pytest.fixture
def layer():
    """A layer of two outputs and three inputs, with a gradient for its weight alone."""
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(WEIGHT.clone())
    layer.weight.grad = GRADIENT.clone()
    return layer


@pytest.fixture
def wrapped(monkeypatch):
    """Wraps a stand-in for one of DeepSpeed's optimizers, in a run of two processes, as accelerate does."""
    monkeypatch.setattr(deepspeed_zero.distributed, "get_world_size", lambda group=2: group)

    def wrap(kind, **attributes):
        wrapper = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
        wrapper.optimizer = type(kind, (SimpleNamespace,), {})(**{"dp_process_group": 2, **attributes})
        return wrapper

    return wrap


def test_one_process_has_whole_tensors(layer):
    for optimizer in (None, torch.optim.SGD(layer.parameters())):
        shards = find_shards(layer, optimizer)
        assert type(shards) is WholeTensors and not shards.scores_before_step


def test_fsdp_2_has_sharded_ones(layer, group):
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    assert type(find_shards(layer)) is ShardedTensors
    with torch.no_grad():
        layer(torch.ones(1, 3))
    assert not any(map(is_sharded, layer.parameters()))  # until the next step
    assert type(find_shards(layer)) is ShardedTensors


@pytest.mark.parametrize("kind", ["DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"])
def test_deepspeed_has_partitions(kind, layer, wrapped):
    shards = find_shards(layer, wrapped(kind))
    assert type(shards) is ZeroPartitions and shards.scores_before_step


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        ("FP16_Optimizer", {}, "DeepSpeed's optimizer is FP16_Optimizer, .*; set the ZeRO stage to 1, 2 or 3"),
        ("BF16_Optimizer", {"dp_process_group": 1}, "DeepSpeed splits the model by tensor or pipeline parallelism"),
        ("DeepSpeedZeroOptimizer_Stage3", {"params_in_nvme_and_cpu": True}, "DeepSpeed keeps parameters on NVMe"),
    ],
)
def test_what_hides_weights_or_gradients_is_refused(kind, attributes, message, layer, wrapped):
    with pytest.raises(RuntimeError, match=message):
        find_shards(layer, wrapped(kind, **attributes))


def test_deepspeed_is_asked_before_its_step_and_what_it_clipped_after(layer, wrapped):
    calls = []
    optimizer = wrapped("DeepSpeedZeroOptimizer", clip_grad=0.5, step=lambda: calls.append("step"))
    shards = find_shards(layer, optimizer)
    undo = shards.call_before_step(lambda: calls.append("score"))
    optimizer.optimizer.step()
    undo()
    optimizer.optimizer.step()
    assert calls == ["score", "step", "step"]
    for norm, factor in ((2.0, 0.25), (0.1, 1.0)):
        optimizer.optimizer._global_grad_norm = norm
        assert shards.clip_factor() == pytest.approx(factor, rel=1e-5)
    optimizer.optimizer.clip_grad = 0.0
    assert shards.clip_factor() == 1.0


def test_whole_tensors_are_never_asked_before_a_step(layer):
    shards = find_shards(layer, optimizer := torch.optim.SGD(layer.parameters()))
    undo = shards.call_before_step(pytest.fail)
    optimizer.step()
    undo()
    assert shards.clip_factor() == 1.0


def test_sums_of_products(layer):
    sums = find_shards(layer).sum_products(layer, PLACES, torch.mul, gradient=True)
    assert {place: found.tolist() for place, found in sums.items()} == {PLACES[0]: [-4, 2], PLACES[1]: [3, -2, -3]}
    sums = find_shards(layer).sum_products(layer, PLACES, torch.abs, gradient=False)
    assert {place: found.tolist() for place, found in sums.items()} == {PLACES[0]: [6, 10], PLACES[1]: [5, 2, 9]}
    assert find_shards(layer).sum_products(layer, [("bias", 0)], torch.mul, gradient=True)["bias", 0].tolist() == [
        0,
        0,
    ]


def test_what_is_not_zero(layer):
    layer.weight.data[:, 1] = 0
    found = find_shards(layer).find_nonzero(layer, PLACES)
    assert {place: used.tolist() for place, used in found.items()} == {
        PLACES[0]: [True, True],
        PLACES[1]: [True, False, True],
    }


def test_zeros_are_written_and_seen_to_return(layer):
    shards = find_shards(layer)
    where = shards.find_own(layer.weight, 1, torch.tensor([0, 2]))
    assert where.tolist() == [0, 2]
    zeros = [("weight", 1, where), ("bias", 0, torch.tensor([1]))]
    for name, dim, positions in zeros:
        shards.write_zeros(layer.get_parameter(name), dim, positions)
    assert layer.weight.tolist() == [[0, -2, 0], [0, 0, 0]] and layer.bias[1] == 0 != layer.bias[0]
    assert shards.find_returned(layer, zeros) == [False, False]
    layer.weight.data[1, 2] = float("nan")
    assert shards.find_returned(layer, zeros) == [True, False]
    assert shards.find_returned(layer, []) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing", False),
        ("weight", True),
        ("gradient there", True),
        ("no gradient", True),
        ("gradient zero everywhere", True),
        ("frozen", False),
    ],
)
def test_what_is_written_after_every_step(change, expected, layer):
    shards, where = find_shards(layer), torch.tensor([1])
    layer.weight.grad[:, 1] = 0
    shards.write_zeros(layer.weight, 1, where)
    if change == "weight":
        layer.weight.data[0, 1] = 1e-45
    elif change == "gradient there":
        layer.weight.grad[0, 1] = 1.0
    elif change == "no gradient":
        layer.weight.grad = None
    elif change == "gradient zero everywhere":
        layer.weight.grad.zero_()
    elif change == "frozen":
        layer.weight.grad = None
        layer.weight.requires_grad_(False)
    assert shards.find_restless(layer, [("weight", 1, where)]) == [expected]


def test_deepspeed_writes_all_zeros_after_every_step(layer, wrapped):
    shards, where = find_shards(layer, wrapped("DeepSpeedZeroOptimizer")), torch.tensor([1])
    assert shards.find_restless(layer, [("weight", 1, where), ("bias", 0, where)]) == [True, True]
    assert shards.find_own(layer.weight, 1, where) is where
    assert shards.sum_products(layer, [], torch.mul, gradient=True) == {} and shards.find_returned(layer, []) == []
