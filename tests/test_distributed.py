"""A whole schedule in two processes gives the masks, and to rounding the weights, of one process."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import compare

TESTS = Path(__file__).parent
WITH_DEEPSPEED = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="deepspeed on the CPU compiles an operator with g++"),
]


def launch(*command: str) -> None:
    """Run tests/distributed.py."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module", params=["bert", "llama"])
def alone(request, tmp_path_factory):
    """What one process makes of a model."""
    out = tmp_path_factory.mktemp("single")
    launch(sys.executable, "distributed.py", "single", request.param, str(out))
    return request.param, out


@pytest.mark.parametrize(
    "mode",
    ["ddp", "fsdp", *(pytest.param(mode, marks=WITH_DEEPSPEED) for mode in ("zero2", "zero3"))],
)
def test_two_processes_do_what_one_does(mode, alone, tmp_path):
    name, one = alone
    launch("torchrun", "--standalone", "--nproc_per_node", "2", "distributed.py", mode, name, str(tmp_path))
    result = compare(one, tmp_path)
    assert (result["processes"], result["steps"], result["other_masks"], result["other_parameters"]) == (2, 12, 0, 0)
    assert result["loss"] < 1e-5
    assert result["weights"] < 1e-5


def test_a_run_in_two_processes_that_is_resumed_ends_bit_equal(tmp_path):
    command = ("torchrun", "--standalone", "--nproc_per_node", "2", "distributed.py", "ddp", "bert")
    launch(*command, str(tmp_path / "whole"))
    launch(*command, str(tmp_path / "resumed"), "--resume", str(tmp_path / "whole" / "run" / "checkpoint-5"))
    result = compare(tmp_path / "whole", tmp_path / "resumed")
    assert (result["processes"], result["steps"], result["other_masks"]) == (2, 7, 0)
    assert (result["loss"], result["weights"]) == (0, 0)
