"""Strategies that slimming cannot follow are refused by name; those that it can are not."""

import pytest
import torch
from conftest import build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from trainers import make_trainer
from transformers.distributed import DistributedConfig

from hf_slim import save_slimmed
from hf_slim.parallel.supported_strategies import refuse_strategy


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp_size": 2}, r"tensor parallelism \(tp_size=2\): data parallelism \(DDP\), FSDP2 and DeepSpeed ZeRO are"),
        ({"pp_size": 2}, r"pipeline parallelism \(pp_size=2\)"),
        ({"tp_size": 2, "ep_size": 2}, r"tensor parallelism \(tp_size=2\)"),
    ],
)
def test_what_transformers_spreads_otherwise_is_refused(sizes, message, tmp_path):
    model = build("llama")
    model.config.distributed_config = DistributedConfig(**sizes)
    with pytest.raises(ValueError, match=f"Slimming does not work with {message}"):
        make_trainer(model, tmp_path).train()
    with pytest.raises(ValueError, match=message):
        save_slimmed(model, tmp_path / "slim")


def test_a_tensor_over_another_dimension_of_the_mesh_is_refused(group):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    model = build("bert")
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(distribute_tensor(dense.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"layer.1.output.dense.weight placed as S.* over the mesh dimension 'tp'"):
        refuse_strategy(model)


def test_fsdp_1_is_refused(group):
    model = FullyShardedDataParallel(build("bert"), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"FSDP version 1, which flattens the parameters \(set fsdp_version: 2"):
        refuse_strategy(model)


@pytest.mark.parametrize("names", [("fsdp",), ("dp_shard_cp",), None])
def test_fsdp_2_is_not_refused(group, names):
    model = build("bert")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=names))
    refuse_strategy(model)


def test_what_is_not_spread_is_not_refused():
    refuse_strategy(build("bert"))
