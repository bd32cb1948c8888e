"""Tensors in files: what is read is what was written, and neither memory nor files are kept longer than needed."""

import errno
import gc
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch

from hf_slim.one_shot.paged_memory import PagedMemory

MEGABYTE = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_copies_are_read_and_written_as_any_tensor(dtype: torch.dtype) -> None:
    memory = PagedMemory()
    values = [torch.randint(0, 2, (3, 7, MEGABYTE + number)).to(dtype) for number in range(3)]
    copies = [memory.copy(value) for value in values]
    memory.page_out()
    for value, copy in zip(values, copies, strict=True):
        assert copy.data_ptr() != value.data_ptr() and copy.dtype == dtype and copy.shape == value.shape
        assert torch.equal(copy, value)
    copies[1][1] = 0
    memory.page_out()
    assert not copies[1][1].any() and torch.equal(copies[1][2], values[1][2])
    assert torch.equal(copies[0], values[0]) and torch.equal(copies[2], values[2])


def test_what_would_not_be_the_same_or_not_worth_it_stays() -> None:
    class Other(torch.Tensor):
        pass

    large = torch.randn(1024, 1024)
    memory = PagedMemory()
    for tensor in (torch.randn(3), large.t(), large.as_subclass(Other), torch.nn.Parameter(large), large.to("meta")):
        assert memory.copy(tensor) is tensor


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back by the system's own choice elsewhere")
def test_what_nobody_reads_takes_no_memory() -> None:
    process, memory = psutil.Process(), PagedMemory()
    before = process.memory_info().rss
    copies = [memory.copy(torch.ones(25 * MEGABYTE)) for _ in range(4)]
    assert sum(float(copy[::1024].sum()) for copy in copies) == 4 * 25 * 1024
    assert process.memory_info().rss - before > 300 * MEGABYTE
    memory.page_out()
    assert process.memory_info().rss - before < 100 * MEGABYTE
    assert all(bool((copy == 1).all()) for copy in copies)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_go_with_their_tensors() -> None:
    def count() -> int:
        return sum("hf_slim-" in os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())

    gc.collect()
    before, memory = count(), PagedMemory()
    for _ in range(5):
        copy = memory.copy(torch.zeros(80 * MEGABYTE))
    assert count() - before <= 4
    assert bool((copy == 0).all())
    del memory, copy
    gc.collect()
    assert count() == before


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    memory = PagedMemory()
    memory.copy(torch.zeros(MEGABYTE))
    with open("/dev/full", "r+b", buffering=0) as full:
        monkeypatch.setattr(memory, "_file", full)
        with pytest.raises(OSError) as caught:
            memory.copy(torch.zeros(MEGABYTE))
    assert caught.value.errno == errno.ENOSPC
