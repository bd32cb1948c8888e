"""Slimming under DeepSpeed ZeRO: two ranks against one plain process, and the arithmetic of the parts."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_slim.parallel import deepspeed_zero
from hf_slim.parallel.deepspeed_zero import ZeroPartitions, _sum_own

TESTS = Path(__file__).parents[1]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
COMMON = {"use_cpu": True, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False}


def train(folder, ranks, settings):
    """What rank 0 of zero_worker.py saw."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({**COMMON, **settings}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja lies beside python
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if ranks == 1:
        command = [sys.executable]
    run = subprocess.run(
        [*command, "zero_worker.py", str(folder / "settings.json")],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return torch.load(folder / "seen.pt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), 1, {"per_device_train_batch_size": 4})


@pytest.mark.deepspeed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="deepspeed on the CPU compiles an operator, and needs g++")
@pytest.mark.parametrize(("stage", "more"), [(2, {}), (3, {}), (3, OFFLOAD)], ids=["2", "3", "3-offload"])
def test_two_ranks_score_and_zero_like_one_process(tmp_path, plain, stage, more):
    config = {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 20000,
            "stage3_param_persistence_threshold": 100,  # biases of 32 and 64 stay whole, weights do not
            "stage3_gather_16bit_weights_on_model_save": True,
            **more,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    seen = train(tmp_path, 2, {"per_device_train_batch_size": 2, "deepspeed": config})
    assert seen["kind"] == ("DeepSpeedZeroOptimizer" if stage == 2 else "DeepSpeedZeroOptimizer_Stage3")
    assert seen["order"] == ["score", "pre", "post"] * 7
    assert min(seen["clips"]) < 0.9 and max(seen["clips"]) == 1.0
    assert seen["same_structures"]
    assert plain["scores"].abs().amax(1).min() > 1e-5
    torch.testing.assert_close(seen["scores"], plain["scores"], rtol=1e-3, atol=1e-8)
    assert seen["untouched"] > 0 and seen["moved"] > 0 and seen["returned"] == 0
    for name, weight in plain["state"].items():
        torch.testing.assert_close(seen["state"][name], weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(seen["saved"][name], seen["state"][name], rtol=0, atol=0)
    assert len(seen["zeros"]) == 20
    assert seen["found"] == [[False] * 20, [True] + [False] * 19]
    assert all((seen["saved"][name].index_select(dim, where) == 0).all() for name, dim, where in seen["zeros"])
    whole = [
        seen["state"][name].abs().sum([d for d in range(seen["state"][name].dim()) if d != dim])
        for name, dim in seen["members"]
    ]
    torch.testing.assert_close(seen["sizes"], torch.cat(whole))


def make_part(whole, gradient, start, length):
    """A parameter of which this rank owns a part, as ZeRO 2 marks it."""
    parameter = nn.Parameter(whole.clone())
    parameter._index_in_param_group = 0
    parameter._hp_mapping = SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=start, numel=length),
        hp_fragment=whole.flatten()[start : start + length].clone(),
        get_lp_grad_fragment=lambda index: gradient.flatten()[start : start + length],
    )
    return parameter


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("cuts", [(0, 30), (0, 1, 30), (0, 7, 8, 30), (0, 13, 30), (0, 15, 29, 30)])
def test_parts_add_up_to_the_whole_wherever_they_are_cut(dim, cuts):
    generator = torch.Generator().manual_seed(0)
    whole, gradient = torch.randn(2, 2, 3, 5, generator=generator)
    parts = [make_part(whole, gradient, a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    others = [d for d in range(3) if d != dim]
    found = sum(_sum_own(part, dim, torch.mul, gradient=True) for part in parts)
    torch.testing.assert_close(found, (whole * gradient).sum(others))
    found = sum(_sum_own(part, dim, torch.abs, gradient=False) for part in parts)
    torch.testing.assert_close(found, whole.abs().sum(others))
    where = torch.tensor([1])
    for part in parts:
        ZeroPartitions.write_zeros(None, part, dim, where)
        torch.testing.assert_close(part.data, whole.index_fill(dim, where, 0), rtol=0, atol=0)
    masters = torch.cat([part._hp_mapping.hp_fragment for part in parts])
    torch.testing.assert_close(masters.view(2, 3, 5), whole.index_fill(dim, where, 0), rtol=0, atol=0)


def test_a_rank_that_owns_nothing_adds_nothing():
    part = make_part(torch.ones(2, 3), torch.ones(2, 3), 0, 6)
    part._hp_mapping = None
    assert _sum_own(part, 1, torch.mul, gradient=True).tolist() == [0, 0, 0]
    ZeroPartitions.write_zeros(None, part, 1, torch.tensor([2]))
    assert part.tolist() == [[1, 1, 0], [1, 1, 0]]


def test_scores_are_those_without_the_loss_scale(monkeypatch):
    monkeypatch.setattr(deepspeed_zero.distributed, "all_reduce", lambda total, group: None)
    model, shards = nn.Module(), ZeroPartitions.__new__(ZeroPartitions)
    model.weight = make_part(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[8.0, 8.0], [0.0, 4.0]]), 0, 4)
    shards._optimizer = SimpleNamespace(dp_process_group=None, loss_scale=8.0)
    places = [("weight", 0), ("weight", 1)]
    sums = shards.sum_products(model, places, torch.mul, gradient=True)
    assert [sums[place].tolist() for place in places] == [[-1, 2], [1, 0]]
    sums = shards.sum_products(model, places, torch.abs, gradient=False)
    assert [sums[place].tolist() for place in places] == [[3, 7], [4, 6]]
    zeros = [("weight", 1, torch.tensor([0])), ("weight", 0, torch.tensor([1]))]
    assert shards.find_returned(model, zeros) == [True, True]
    shards.write_zeros(model.weight, 1, torch.tensor([0]))
    assert shards.find_returned(model, zeros) == [False, True]
