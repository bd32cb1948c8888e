"""Tensors in files: what is read is what was written, and neither memory nor files are kept longer than needed."""

import errno
import gc
import mmap
import os
import sys

import psutil
import pytest
import torch
from conftest import build
from test_slimming import HALF

from hf_slim import slim
from hf_slim.one_shot import paged_memory
from hf_slim.one_shot.paged_memory import PagedMemory

MEGABYTE = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_moved_are_read_and_written_as_any_tensor(dtype: torch.dtype) -> None:
    memory = PagedMemory()
    values = [torch.randint(0, 2, (3, 7, MEGABYTE + number)).to(dtype) for number in range(3)]
    moved = [memory.move(value) for value in values]
    memory.page_out()
    for value, one in zip(values, moved, strict=True):
        assert one.data_ptr() != value.data_ptr() and one.dtype == dtype and one.shape == value.shape
        assert torch.equal(one, value)
    moved[1][1] = 0
    memory.page_out()
    assert not moved[1][1].any() and torch.equal(moved[1][2], values[1][2])
    assert torch.equal(moved[0], values[0]) and torch.equal(moved[2], values[2])


def test_what_would_not_be_the_same_or_not_worth_it_stays() -> None:
    class Other(torch.Tensor):
        pass

    large = torch.randn(1024, 1024)
    memory = PagedMemory()
    for tensor in (torch.randn(3), large.t(), large.as_subclass(Other), torch.nn.Parameter(large), large.to("meta")):
        assert memory.move(tensor) is tensor


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back by the system's own choice elsewhere")
def test_what_nobody_reads_takes_no_memory() -> None:
    process, memory = psutil.Process(), PagedMemory()
    before = process.memory_info().rss
    moved = [memory.move(torch.ones(25 * MEGABYTE)) for _ in range(4)]
    assert sum(float(one[::1024].sum()) for one in moved) == 4 * 25 * 1024
    assert process.memory_info().rss - before > 300 * MEGABYTE
    memory.page_out()
    assert process.memory_info().rss - before < 200 * MEGABYTE
    assert all(bool((one == 1).all()) for one in moved)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.filterwarnings("error::ResourceWarning")
def test_files_go_with_their_tensors() -> None:
    gc.collect()
    before, memory = len(os.listdir("/proc/self/fd")), PagedMemory()
    held = [memory.move(torch.full((2 * MEGABYTE,), float(number))) for number in range(70)]
    assert len(os.listdir("/proc/self/fd")) - before == 4  # three files, and the last one to write to
    memory.page_out()
    del held[:-1]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before == 2
    memory.close()
    del memory
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before == 1
    assert bool((held[0] == 69).all())
    held.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_cannot_be_made_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = PagedMemory()
    first = memory.move(torch.ones(MEGABYTE))
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", fail)
        with pytest.raises(OSError, match="Cannot allocate memory: what forward passes hold while they wait"):
            memory.move(torch.zeros(80 * MEGABYTE))
    second = memory.move(torch.full((MEGABYTE,), 7.0))
    memory.page_out()
    assert bool((first == 1).all()) and bool((second == 7).all())


def fail(*args: object) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_no_room_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(paged_memory, "_LEAST", 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = build("llama")
    rows = [{"input_ids": torch.randint(0, 64, (6,))} for _ in range(2)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * MEGABYTE, limit[1]))
    try:
        with pytest.raises(
            OSError, match=r"found no room in .*\. Name a folder with more room in the variable TMPDIR"
        ):
            slim(model, rows, HALF, num_calibration_samples=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
