"""Parts of tensors in two processes: together they are summed up and zeroed like whole ones."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_slim.parallel.sharded_tensors import ShardedTensors, is_sharded

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told(warm_python, tmp_path_factory):
    """What two processes said, each in a dictionary."""
    out = tmp_path_factory.mktemp("parts")
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "shards_worker.py", str(out)]
    environment = warm_python.environment()
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_both_know_the_sums_over_whole_tensors(told):
    """Of the numbers 1 to 15 in five rows, of which the first process holds three, and of 1 to 3 in one."""
    for found in told:
        assert found["sums"] == {
            "rows.weight 0": [6, 15, 24, 33, 42],
            "rows.weight 1": [35, 40, 45],
            "columns.weight 0": [6, 15, 24, 33, 42],
            "columns.weight 1": [35, 40, 45],
            "one.weight 0": [6],
            "one.weight 1": [1, 2, 3],
            "whole 0": [1, 2],
        }
        assert found["products"] == {"rows.weight 0": [12, 30, 48, 66, 84], "one.weight 0": [0]}


def test_each_writes_the_zeros_of_its_part(told):
    assert [found["own"] for found in told] == [
        {"rows.weight 0": [0, 2], "rows.weight 1": [1], "columns.weight 1": [1], "one.weight 0": [0], "whole 0": [1]},
        {"rows.weight 0": [0], "rows.weight 1": [1], "columns.weight 1": [], "one.weight 0": [], "whole 0": [1]},
    ]
    for found in told:
        assert found["rows"] == [[0, 0, 0], [4, 0, 6], [0, 0, 0], [0, 0, 0], [13, 0, 15]]
        assert found["columns"] == [[1, 0, 3], [4, 0, 6], [7, 0, 9], [10, 0, 12], [13, 0, 15]]
        assert found["momentum"] == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
        assert found["nonzero"] == {"rows.weight 0": [False, True, False, False, True], "one.weight 0": [False]}


def test_each_sees_what_returns_in_its_part(told):
    assert [found["returned"] for found in told] == [[False, True], [True, True]]
    assert [found["restless"] for found in told] == [[False, True], [True, True]]


def test_both_get_the_masks_and_scores_of_whole_weights(told):
    assert told[0]["model"] == told[1]["model"] == {"scores": True, "masks": True, "weights": True}


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_a_part_may_be_the_whole(placement, group):
    sharded = distribute_tensor(torch.arange(6.0).view(2, 3), init_device_mesh("cpu", (1,)), [placement])
    model = nn.ParameterDict({"weight": nn.Parameter(sharded)})
    shards = ShardedTensors()
    assert is_sharded(sharded) and is_sharded(model["weight"]) and not is_sharded(torch.ones(1))
    sums = shards.sum_products(model, [("weight", 1)], torch.abs, gradient=False)
    assert sums["weight", 1].tolist() == [3, 5, 7]
    assert shards.find_own(model["weight"], 1, torch.tensor([0, 2])).tolist() == [0, 2]
