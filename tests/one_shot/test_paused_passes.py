"""Forward passes that wait: each goes on as if it had never stopped, and what it set leaves nothing anywhere else."""

import contextvars
import copy
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import psutil
import pytest
import torch
from conftest import FAMILIES, build
from test_slimming import HALF, assert_same, make_rows, pytorch_is_as_it_was, state_of  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

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


def write_to_input(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
    args[0].add_(1)


def go(model: Model, batches: int = 3, values: tuple[int, ...] = (2, 4)) -> None:
    """Run batches that wait at every block."""
    rows = [{"x": torch.full(values, float(number + 1))} for number in range(batches)]
    with paused(model, rows, list(model.blocks), lambda batch: batch) as passes:
        for block in model.blocks:
            waiting = passes.waiting_at(block)
            assert [one.number for one in waiting] == list(range(batches))
            for one in waiting:
                passes.run_module(one, nullcontext())
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


def test_blocks_that_write_to_their_inputs_can_be_run_beside_the_pass() -> None:
    model = Model(through)
    for block in model.blocks:
        block.register_forward_pre_hook(write_to_input)
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[3.0 * (2 * n + 3)] for n in (1, 2, 3)]


@pytest.mark.parametrize("mode", [nullcontext, torch.enable_grad, torch.inference_mode])
def test_what_is_costly_runs_in_the_thread_that_asked_unless_a_pass_has_modes_of_its_own(mode: Any) -> None:
    threads = []

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        with mode():
            return through(model, x)

    model = Model(around)
    for module in (model.before, *(block.linear for block in model.blocks)):
        module.register_forward_hook(
            lambda *args: threads.append(threading.get_ident() == threading.main_thread().ident)
        )
    go(model)
    alone = mode is not nullcontext
    assert threads[:3] == [False] * 3  # hooks of what is replaced run where it is called
    assert threads[3:] == [not alone] * 12
    assert type(model.before) is torch.nn.Identity and all(type(block) is Block for block in model.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_forward_pass_holds_in_it_alone(dtype: torch.dtype) -> None:
    outside = []

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        outside.append((torch.mm(x, x.t()).dtype, torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            x = through(model, x)
        outside.append((torch.mm(x.float(), x.float().t()).dtype, torch.is_autocast_enabled("cpu")))
        return x

    model, kinds = Model(around), []
    for block in model.blocks:
        block.linear.register_forward_hook(lambda *args: kinds.append(args[-1].dtype))
    go(model)
    assert set(outside) == {(torch.float32, False)} and len(outside) == 6
    assert set(kinds) == {dtype} and len(kinds) == 12  # in the passes, and where blocks are run by themselves


def test_weights_that_autocast_has_cast_are_cast_anew_after_a_change() -> None:
    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            return through(model, x)

    model = Model(around)
    with paused(model, [{"x": torch.ones(2, 4)}] * 2, list(model.blocks), lambda batch: batch) as passes:
        for block in model.blocks:
            for one in passes.waiting_at(block):
                passes.run_module(one, nullcontext())
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


def test_context_variables_are_those_of_the_caller_and_then_of_each_pass() -> None:
    seen = []

    class Set(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(SEEN.get())
            SEEN.set(f"batch {int(x[0, 0])}")
            return x

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        x = through(model, model.beside(x))
        seen.append(SEEN.get())
        return x

    model = Model(around)
    model.beside = Set()
    model.blocks[1].linear.register_forward_pre_hook(lambda *args: seen.append(SEEN.get()))
    token = SEEN.set("the caller's")
    try:
        rows = [{"x": torch.full((2, 4), float(number))} for number in range(3)]
        with paused(model, rows, list(model.blocks), lambda batch: batch) as passes:
            for block in model.blocks:
                passes.release(block)
        assert SEEN.get() == "the caller's"
    finally:
        SEEN.reset(token)
    assert seen == ["the caller's"] * 3 + [f"batch {number}" for number in (0, 0, 1, 1, 2, 2)]


def test_what_a_forward_pass_changes_of_its_modules_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        other = copy.copy(model.blocks[0])  # with weights of its own
        other._modules = {"linear": torch.nn.Linear(4, 4, bias=False)}
        other.linear.weight.data = torch.eye(4)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Identity, "forward", twice)
            y = model.before(x)
        with monkeypatch.context() as patch:
            patch.setattr(model.before, "forward", lambda x: 5 * x)
            y = y + model.before(x)
        return through(model, x) + other(x) + y

    model = Model(around)
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[(6 + 1 + 2 + 5) * float(n)] for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (lambda module, x: x, 2.0),  # as dropout does in evaluation mode
        (lambda module, x: (x * 1).unflatten(0, (1, 2)).unbind()[0], 1.0),
    ],
)
def test_what_shares_memory_goes_on_sharing_it(share: Any, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_memory, "_LEAST", 0)

    class Beside(torch.nn.Module):
        forward = share

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        start = torch.ones(2, 4)
        same = model.beside(start)
        through(model, x)
        same += 1
        return start

    model = Model(around)
    model.beside = Beside()
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[expected]] * 3


def test_a_module_that_is_copied_in_a_pass_computes_with_its_own_weights() -> None:
    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        other = copy.deepcopy(model.blocks[0])
        other.linear.weight.data *= 10
        return through(model, x) + other(x)

    model = Model(around)
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[26.0 * n] for n in (1, 2, 3)]
    assert float(copy.deepcopy(model.blocks[0])(torch.ones(1, 4)).sum()) == 8


@pytest.mark.parametrize("own", [None, lambda x: x * 5])
def test_forward_methods_are_what_they_were(own: Any) -> None:
    model = Model(through)
    if own is not None:
        model.before.forward = own
    go(model)
    assert vars(model.before).get("forward") is own
    assert [result.unique().tolist() for result in model.results] == [[(30.0 if own else 6.0) * n] for n in (1, 2, 3)]


def test_tuples_are_moved_as_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_memory, "_LEAST", 0)
    seen = []

    class Several(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            x = x * 1
            seen.append(x.data_ptr())
            return x, None, 3, x + 1, None

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        first, none, three, second, last = model.beside(x)
        assert (none, three, last) == (None, 3, None) and first.data_ptr() != seen[-1]
        return through(model, first + second)

    model = Model(around)
    model.beside = Several()
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[6.0 * (2 * n + 1)] for n in (1, 2, 3)]


def test_outputs_that_share_memory_go_on_sharing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_memory, "_LEAST", 0)

    class Halves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x * 1
            return x, x[:1]

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        whole, half = model.beside(x)
        through(model, x)
        half.zero_()
        return whole

    model = Model(around)
    model.beside = Halves()
    go(model)
    assert [result.sum(1).tolist() for result in model.results] == [[0.0, 4.0 * n] for n in (1, 2, 3)]


def test_weights_without_storage_are_no_hindrance() -> None:
    """As quantized weights are: a wrapper around others."""

    class Double(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(TwoTensor(torch.ones(4), torch.ones(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight.a

    model = Model(lambda model, x: through(model, model.beside(x)))
    model.beside = Double()
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[6.0 * n] for n in (1, 2, 3)]


def test_passes_within_a_pass_wait_for_their_own() -> None:
    inner = Model(through)

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        go(inner)
        return through(model, x)

    model = Model(around)
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[6.0 * n] for n in (1, 2, 3)]
    assert [result.unique().tolist() for result in inner.results] == [[6.0 * n] for n in (1, 2, 3)] * 3


def test_modules_that_are_compiled_in_a_forward_pass_are_compiled_as_they_are() -> None:
    compiled = torch.compile(lambda module, x: module(x) + 1, backend="eager", fullgraph=True)
    model = Model(lambda model, x: through(model, compiled(model.before, x)))
    go(model)
    assert [result.unique().tolist() for result in model.results] == [[6.0 * (n + 1)] for n in (1, 2, 3)]


def test_gradients_within_a_forward_pass_are_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_memory, "_LEAST", 0)

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(through(model, x).sum(), x)[0]

    model = Model(around)
    go(model)
    assert all(bool((result == 6).all()) for result in model.results) and len(model.results) == 3


class Shift(TorchFunctionMode):
    """Adds one to what linear layers give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        result = func(*args, **(kwargs or {}))
        return result + 1 if func is torch.nn.functional.linear else result


def test_function_modes_of_a_forward_pass_hold_in_it_alone() -> None:
    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        assert torch.empty(1).device.type == "cpu"
        with Shift(), torch.device("meta"):
            assert torch.empty(1).device.type == "meta"
            x = through(model, x)
            assert torch.empty(1).device.type == "meta"
        assert torch.empty(1).device.type == "cpu"
        return x

    model = Model(around)
    rows = [{"x": torch.full((2, 4), float(number))} for number in range(3)]
    given: list[float] = []
    with paused(model, rows, list(model.blocks), lambda batch: batch) as passes:
        for block in model.blocks:
            assert torch.empty(1).device.type == "cpu"
            handle = block.register_forward_hook(lambda module, args, output: given.append(float(output.mean())))
            for one in passes.waiting_at(block):
                passes.run_module(one, nullcontext())
            handle.remove()
            passes.release(block)
    assert given == [1.0, 3.0, 5.0, 4.0, 10.0, 16.0]  # what the blocks give when they are run beside the passes
    assert [float(result.mean()) for result in model.results] == [3.0 * (2 * n + 1) + 1 for n in range(3)]


@pytest.mark.parametrize("again", [lambda model, x: model.blocks[1](x), lambda model, x: model.blocks[5]])
def test_passes_that_catch_everything_are_ended_all_the_same(again: Callable[[Model, torch.Tensor], Any]) -> None:
    ended = []

    def around(model: Model, x: torch.Tensor) -> torch.Tensor:
        try:
            return through(model, x)
        except BaseException:
            return again(model, x)
        finally:
            ended.append(1)

    model = Model(around)
    rows = [{"x": torch.ones(2, 4)}] * 4
    with (
        pytest.raises(KeyboardInterrupt, match="mine"),
        paused(model, rows, list(model.blocks), lambda batch: batch),
    ):
        raise KeyboardInterrupt("mine")
    assert len(ended) == 4 and not model.results
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert type(model.before) is torch.nn.Identity and all(type(block) is Block for block in model.blocks)


def test_passes_that_have_not_begun_never_do() -> None:
    model = Model(through)
    passes = PausedPasses(model, [{"x": torch.ones(2, 4)}] * 3, list(model.blocks), lambda batch: batch)
    passes.close()
    passes.close()
    assert not model.results


def test_what_waits_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux" or not hasattr(psutil, "heap_trim"):
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
            passes.run_module(one, nullcontext())
            used.append(process.memory_info().rss - before)
    assert max(used) < 100 * 1e6  # of 336 MB that the passes hold
