"""One process of two of test_sharded_tensors.py: `torchrun --nproc-per-node 2 shards_worker.py FOLDER`.

Writes what it holds and what it was told to FOLDER/RANK.json.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import build, half_masks, make_batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_slim import find_structures
from hf_slim.compaction.zeros import find_zero_units, zero_units
from hf_slim.parallel.gathering import gather_weights
from hf_slim.parallel.shards import find_shards
from hf_slim.parallel.whole_tensors import WholeTensors
from hf_slim.training.importance import score_structures


def make_layers(mesh):
    """Weights in parts by rows, by columns, and of one row; and one that is whole."""
    numbers = torch.arange(1.0, 16.0).view(5, 3)
    model = nn.Module()
    for name, values, dim in (("rows", numbers, 0), ("columns", numbers, 1), ("one", numbers[:1], 0)):
        layer = nn.Module()
        layer.weight = nn.Parameter(distribute_tensor(values, mesh, [Shard(dim)]))
        model.add_module(name, layer)
    model.whole = nn.Parameter(torch.tensor([1.0, 2.0]))
    return model


def as_lists(found):
    return {f"{name} {dim}": values.tolist() for (name, dim), values in found.items()}


def see_layers(mesh):
    """What is said of single weights."""
    model = make_layers(mesh)
    rows, columns = model.rows.weight, model.columns.weight
    shards = find_shards(model)
    places = [(name, dim) for name, p in model.named_parameters() for dim in range(p.dim())]
    places.sort(key=lambda place: ["rows.weight", "columns.weight", "one.weight", "whole"].index(place[0]))
    seen = {"sums": as_lists(shards.sum_products(model, places, torch.abs, gradient=False))}
    rows.grad = distribute_tensor(torch.full((5, 3), 2.0), mesh, [Shard(0)])
    asked = [("rows.weight", 0), ("one.weight", 0)]
    seen["products"] = as_lists(shards.sum_products(model, asked, torch.mul, gradient=True))

    dropped = {
        ("rows.weight", 0): torch.tensor([0, 2, 3]),
        ("rows.weight", 1): torch.tensor([1]),
        ("columns.weight", 1): torch.tensor([1]),
        ("one.weight", 0): torch.tensor([0]),
        ("whole", 0): torch.tensor([1]),
    }
    own = {place: shards.find_own(model.get_parameter(place[0]), place[1], at) for place, at in dropped.items()}
    momentum = distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)])
    for (name, dim), where in own.items():
        shards.write_zeros(model.get_parameter(name), dim, where)
    shards.write_zeros(momentum, 0, own["rows.weight", 0])
    seen |= {"own": as_lists(own), "nonzero": as_lists(shards.find_nonzero(model, asked))}
    seen |= {
        "rows": rows.full_tensor().tolist(),
        "columns": columns.full_tensor().tolist(),
        "momentum": momentum.full_tensor().tolist(),
    }
    if dist.get_rank() == 1:
        rows.detach().to_local()[0, 0] = 1.0  # the fourth row
    model.whole.data[1] = 1.0
    zeros = [("rows.weight", 0, own["rows.weight", 0]), ("whole", 0, own["whole", 0])]
    seen["returned"] = shards.find_returned(model, zeros)
    rows.grad.to_local()[own["rows.weight", 0]] = 0.0
    seen["restless"] = shards.find_restless(model, zeros)
    return seen


def see_model(mesh):
    """Whether a model in parts is scored and zeroed like a whole one."""
    whole = build("bert", spread=0.05)
    model = copy.deepcopy(whole)
    for layer in (*model.bert.encoder.layer, model):
        fully_shard(layer, mesh=mesh)
    structures = find_structures(whole).structures
    for each in (whole, model):
        each.eval()(**make_batch(whole)).loss.backward()
    expected = score_structures(whole, structures, "taylor", WholeTensors())
    found = score_structures(model, structures, "taylor", find_shards(model))
    masks = half_masks(structures)
    for each in (whole, model):
        zero_units(each, structures, masks)
    units = find_zero_units(model, structures, whole=True)
    weights = gather_weights(model)
    state = whole.state_dict() if dist.get_rank() == 0 else {}
    assert weights.keys() == state.keys()
    return {
        "scores": all(torch.allclose(found[name], scores, rtol=1e-4, atol=1e-7) for name, scores in expected.items()),
        "masks": all(torch.equal(units[name], mask) for name, mask in masks.items()),
        "weights": all(torch.equal(weights[name], tensor) for name, tensor in state.items()),
    }


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    seen = {**see_layers(mesh), "model": see_model(mesh)}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
