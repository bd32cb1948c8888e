"""Peaks of memory, measured in processes of their own."""

import os
from dataclasses import replace

import pytest
import torch

from hf_slim.bench.flags import BenchArguments
from hf_slim.bench.memory import _find_peak, read_weights, run_fresh
from hf_slim.bench.memory import _read_held as read_held
from hf_slim.bench.memory import _read_peak as read_peak
from hf_slim.bench.shapes import make_cases

MEGABYTE = 10**6
linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are those of Linux")


def _measure(size: int) -> tuple[int, int]:
    """What a tensor adds to what is held and to the peak, in bytes, after a larger one was freed before the reset."""
    torch.ones(4 * size, dtype=torch.uint8)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = read_held(False)
    kept = torch.ones(size, dtype=torch.uint8)
    held = read_held(False) - before
    del kept
    return held, read_peak(False) - before


@linux
def test_held_and_peak_are_those_of_a_tensor():
    size = 200 * MEGABYTE
    held, peak = run_fresh(_measure, size)
    assert held == pytest.approx(size, abs=8 * MEGABYTE) and peak == pytest.approx(size, abs=8 * MEGABYTE)


def test_a_fresh_process_is_another():
    assert run_fresh(os.getpid) not in (os.getpid(), run_fresh(os.getpid))


def test_weights_are_read_once(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    read, add = [], torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda tensor: (read.append(tuple(tensor.shape)), add(tensor)))
    read_weights(model)
    assert read == [(3, 2), (3,), (2, 3), (2,)]


def test_where_no_peak_can_be_measured_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith("/proc"))
    (case,) = make_cases(BenchArguments(["gpt2"], output_dir=str(tmp_path)))
    assert _find_peak("plain", replace(case, batch_size=1, length=8), str(tmp_path)) is None
