"""Forward passes that wait: each goes on as if it had never stopped, and what it set leaves nothing anywhere else."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from conftest import FAMILIES, build
from test_slimming import HALF, assert_same, make_rows, state_of

from hf_slim import slim
from hf_slim.one_shot import paged_memory
from hf_slim.one_shot.paused_passes import PausedPasses, paused

SEEN: contextvars.ContextVar[str] = contextvars.ContextVar("SEEN", default="nothing")


class Block(torch.nn.Module):
    """A layer that may come to a wait."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, bias=False)
        self.linear.weight.data = gain * torch.eye(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Model(torch.nn.Module):
    """Two blocks, and what a test does around them."""

    def __init__(self, around: Callable[["Model", torch.Tensor], Any]) -> None:
        super().__init__()
        self.before, self.blocks = torch.nn.Identity(), torch.nn.ModuleList([Block(2.0), Block(3.0)])
        self._around, self.results = around, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._around(self, self.before(x))
        self.results.append(x)
        return x


def through(model: Model, x: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        x = block(x)
    return x


def go(model: Model, batches: int = 3, values: tuple[int, ...] = (2, 4)) -> None:
    """Run batches that wait at every block."""
    rows = [{"x": torch.full(values, float(number + 1))} for number in range(batches)]
    with paused(model, rows, list(model.blocks), lambda batch: batch) as passes:
        for block in model.blocks:
            waiting = passes.waiting_at(block)
            assert [one.number for one in waiting] == list(range(batches))
            for one in waiting:
                one.run_module()
            passes.release(block)


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_and_unpaged_passes_slim_alike(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for least in (1 << 40, 0):
        monkeypatch.setattr(paged_memory, "_LEAST", least)
        model = build(family)
        slim(model, make_rows(model), HALF, num_calibration_samples=24, batch_size=5)
        states.append(state_of(model))
    assert_same(model, states[0])


def test_all_passes_run_in_the_thread_that_asked() -> None:
    threads = set()

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        threads.add(threading.get_ident())
        return through(model, x)

    go(Model(around))
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_forward_pass_holds_in_it_alone(dtype: torch.dtype) -> None:
    outside = []

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        outside.append((torch.mm(x, x.t()).dtype, torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", dtype=dtype):
            x = through(model, x)
        outside.append((torch.mm(x.float(), x.float().t()).dtype, torch.is_autocast_enabled("cpu")))
        return x

    model, kinds = Model(around), []
    handles = [
        block.linear.register_forward_hook(lambda *args: kinds.append(args[-1].dtype)) for block in model.blocks
    ]
    go(model)
    assert set(outside) == {(torch.float32, False)} and len(outside) == 6
    assert set(kinds) == {dtype} and len(kinds) == 12  # in the passes, and where blocks are run by themselves
    assert len(handles) == 2 and not torch.is_autocast_enabled("cpu")


def test_weights_that_autocast_has_cast_are_cast_anew_after_a_change() -> None:
    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            return through(model, x)

    model = Model(around)
    with paused(model, [{"x": torch.ones(2, 4)}] * 2, list(model.blocks), lambda batch: batch) as passes:
        for block in model.blocks:
            for one in passes.waiting_at(block):
                one.run_module()
            with torch.no_grad():
                block.linear.weight.mul_(10)
            passes.release(block)
    assert all(bool((result == 600).all()) for result in model.results) and len(model.results) == 2


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_gradient_and_inference_modes_hold_in_their_pass_alone(mode: Callable[[], Any]) -> None:
    def read() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        begin = read()
        with mode():
            inside = read()
            for block in model.blocks:
                x = block(x)
                assert read() == inside
        assert read() == begin == (False, False)
        return x

    model = Model(around)
    with paused(model, [{"x": torch.ones(2, 4)}] * 3, list(model.blocks), lambda batch: batch) as passes:
        for block in model.blocks:
            assert read() == (True, False)
            passes.release(block)
    assert read() == (True, False) and len(model.results) == 3


def test_context_variables_of_the_caller_are_seen_and_those_of_a_pass_are_its_own() -> None:
    seen = []

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        seen.append(SEEN.get())
        SEEN.set(f"batch {int(x[0, 0])}")
        x = through(model, x)
        seen.append(SEEN.get())
        return x

    token = SEEN.set("the caller's")
    try:
        go(Model(around))
        assert SEEN.get() == "the caller's"
    finally:
        SEEN.reset(token)
    assert seen == ["the caller's"] * 3 + ["batch 1", "batch 2", "batch 3"]


def test_what_a_module_was_given_and_gives_back_stays_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_memory, "_LEAST", 0)

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        start = x.clone()
        same = model.before(start)  # as dropout does in evaluation mode
        x = through(model, x)
        same += 1
        return x + start

    model = Model(around)
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[8.0], [15.0], [22.0]]  # 6 x + (x + 1)


def test_a_pass_that_catches_everything_is_ended_all_the_same() -> None:
    ended = []

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        try:
            return through(model, x)
        except BaseException:
            return model.blocks[1](x)
        finally:
            ended.append(1)

    model = Model(around)
    with (
        pytest.raises(RuntimeError, match="mine"),
        paused(model, [{"x": torch.ones(2, 4)}] * 3, list(model.blocks), lambda batch: batch),
    ):
        raise RuntimeError("mine")
    assert len(ended) == 3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_passes_that_have_not_begun_never_do() -> None:
    model = Model(through)
    passes = PausedPasses(model, [{"x": torch.ones(2, 4)}] * 3, list(model.blocks), lambda batch: batch)
    passes.close()
    passes.close()
    assert not model.results


def test_what_waits_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(psutil.Process().memory_info(), "shared"):
        pytest.skip("memory is given back by the system's own choice elsewhere")
    sizes = (1 << 20, 4)  # 16 MB a batch

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        start = model.blocks[0](x)
        return model.blocks[1](start) + start

    model = Model(around)
    batches = [{"x": torch.ones(1, 1).expand(sizes)} for _ in range(20)]
    process, used = psutil.Process(), []
    with paused(model, batches, list(model.blocks), lambda batch: batch) as passes:
        before = process.memory_info().rss
        passes.release(model.blocks[0])
        used.append(process.memory_info().rss - before)
        for one in passes.waiting_at(model.blocks[1]):
            one.run_module()
            used.append(process.memory_info().rss - before)
    assert max(used) < 100 * 1e6  # of 336 MB that the passes hold
