"""A whole schedule in two processes gives the masks, and to rounding the weights, of one process."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import compare

TESTS = Path(__file__).parents[1]
IN_TWO = ("torchrun", "--standalone", "--nproc_per_node", "2")
WITH_DEEPSPEED = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="deepspeed on the CPU compiles an operator with g++"),
]


@pytest.fixture(scope="session")
def launch(request: pytest.FixtureRequest):
    """Runs a command in the folder of the tests; what it imports is imported already, but for DeepSpeed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    if importlib.util.find_spec("deepspeed") is None:
        environment = request.getfixturevalue("warm_python").environment()

    def launch(*command: str) -> None:
        done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-6000:]

    return launch


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """Trains a model in one process or in two, in the same way only once; gives the folder."""

    @functools.cache
    def train(mode: str, name: str) -> Path:
        out = tmp_path_factory.mktemp(mode)
        launch(*(("python",) if mode == "single" else IN_TWO), "distributed.py", mode, name, str(out))
        return out

    return train


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("ddp", "bert"),
        ("fsdp", "llama"),
        pytest.param("ddp", "llama", marks=pytest.mark.slow),
        pytest.param("fsdp", "bert", marks=pytest.mark.slow),
        *(pytest.param(mode, name, marks=WITH_DEEPSPEED) for name in ("bert", "llama") for mode in ("zero2", "zero3")),
    ],
)
def test_two_processes_do_what_one_does(mode, name, trained):
    result = compare(trained("single", name), trained(mode, name))
    assert (result["processes"], result["steps"], result["other_masks"], result["other_parameters"]) == (2, 12, 0, 0)
    assert result["loss"] < 1e-5
    assert result["weights"] < 1e-5


@pytest.mark.parametrize(
    ("name", "modes"), [("bert", ["ddp"]), pytest.param("llama", ["ddp", "fsdp"], marks=pytest.mark.slow)]
)
def test_two_processes_learn_from_a_teacher_as_one_does(name, modes, launch, tmp_path):
    launch("python", "distributed.py", "single", name, str(tmp_path / "one"), "--teacher")
    wanted = json.loads((tmp_path / "one" / "result-0.json").read_text())["distances"]
    assert len(wanted) == 12 and min(wanted) > 0.01
    for mode in modes:
        launch(*IN_TWO, "distributed.py", mode, name, str(tmp_path / mode), "--teacher")
        result = compare(tmp_path / "one", tmp_path / mode)
        assert (result["processes"], result["steps"], result["other_masks"]) == (2, 12, 0)
        assert max(result["loss"], result["weights"]) < 1e-5
        got = json.loads((tmp_path / mode / "result-0.json").read_text())["distances"]
        assert got == pytest.approx(wanted, abs=1e-5)


def test_a_run_in_two_processes_that_is_resumed_ends_bit_equal(trained, launch, tmp_path):
    whole = trained("ddp", "bert")
    launch(*IN_TWO, "distributed.py", "ddp", "bert", str(tmp_path), "--resume", str(whole / "run" / "checkpoint-5"))
    result = compare(whole, tmp_path)
    assert (result["processes"], result["steps"], result["other_masks"]) == (2, 7, 0)
    assert (result["loss"], result["weights"]) == (0, 0)


def test_every_process_fails_where_the_first_one_does(launch, tmp_path):
    """And none waits for another: each save ends in both, and the next one works."""
    launch(*IN_TWO, "failing.py", str(tmp_path))
    first, second = (json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1))
    written = f"The folder {tmp_path}/{{}} could not be written: disk full. What was there before is unchanged."
    assert first.pop("an upload").startswith("RuntimeError: The upload to me/x failed: ")
    assert second.pop("an upload").startswith(
        "RuntimeError: The first process failed: RuntimeError: The upload to me/x"
    )
    assert first == {
        "a file": f"NotADirectoryError: output_dir='{tmp_path}/file' is a file; name a folder.",
        "writing": f"OSError: {written.format('slim')}",
        "an interrupt": "KeyboardInterrupt: stop",
        "nothing": "29538",
        "sharded, writing": f"OSError: {written.format('sharded')}",
        "sharded, building": "MemoryError: no memory to put it together",
        "sharded, nothing": "29538",
        "in place": "29538",
    }
    assert second == {
        name: end if end == "29538" else f"RuntimeError: The first process failed: {end}"
        for name, end in first.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("file", "inplace", "pushed", "result-0.json", "result-1.json", "sharded", "slim")
    ]
