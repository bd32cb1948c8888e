"""Forward passes that wait at modules, one for each batch, so that a model can be changed while they are under way."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..parallel import find_device
from .calibration_batches import naming_batch
from .kept_weights import finish
from .paged_memory import PagedMemory
from .replaced_forward import ReplacedForward
from .thread_state import is_plain

_BEGIN = 1.0
"""Seconds in which a thread that was asked to begin has begun, if it ever does."""


class _Cancelled(BaseException):
    """Ends a pass that nobody needs any more."""


class Enough(BaseException):
    """Ends a run of a module in which all has been seen."""


class PausedPass(threading.Thread):
    """One forward pass, in a thread of its own, which runs only while `advance` waits for it.

    What is costly in it is run by the thread that advances it: MKL, OpenMP and the allocator keep memory, and OpenMP
    threads, for each thread that has computed.

    Args:
        model: The model.
        batch: What it is given.
        number: The number of the batch.
        send: Brings a batch to the model's device.
    """

    def __init__(
        self, model: nn.Module, batch: Mapping[str, Any], number: int, send: Callable[[Mapping[str, Any]], Any]
    ) -> None:
        """See the class."""
        super().__init__(daemon=True, name="hf_slim-pass")
        self.batch, self.number = batch, number
        self.module: nn.Module | None = None
        self._model, self._send = model, send
        self._inputs: tuple[Any, Any] = ((), {})
        self._task: Callable[[], Any] | None = None
        self._answer: tuple[Any, BaseException | None] = (None, None)
        self._order: Callable[[], Any] | None = None
        self._context = contextvars.copy_context()
        self._go, self._paused = SimpleQueue[None](), SimpleQueue[None]()  # in C: no interrupt falls into them
        self._asked, self._begun = False, threading.Event()
        self._error: BaseException | None = None
        self._cancelled = self._is_plain = False
        self.is_ordered = False  # whether it runs a module beside the pass

    def advance(self) -> None:
        """Let it run until it waits at a module, or ends; raises what it raises."""
        self.module, self._inputs = None, ((), {})
        self._proceed()

    def run_module(self, watch: AbstractContextManager[Any]) -> None:
        """Run the module that it waits at, on what it waits with; the pass itself stays where it is.

        Args:
            watch: What to run it in.
        """
        assert self.module is not None
        run = partial(_run_within, watch, self.module, *self._inputs)
        if self._is_plain:
            run()
        else:  # modes and the like are those of its thread
            self._order = run
            self._proceed()

    def pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Wait at a module; called in the thread itself.

        Args:
            module: The module.
            args: What it is called with.
            kwargs: The same by name.
        """
        self.module, self._inputs, self._is_plain = module, (args, kwargs), is_plain()
        self._wait()
        while self._order is not None:
            order, self._order, self.is_ordered = self._order, None, True
            try:
                order()
            except BaseException as error:  # raised again by `run_module`
                self._error = error
            self.is_ordered = False
            self._wait()

    def hand_over(self, task: Callable[[], Any]) -> Any:
        """Have something done by the thread that waits for this one; called in the thread itself.

        Args:
            task: What to do.

        Returns:
            What it gives; raises what it raises.
        """
        context = contextvars.copy_context()
        self._task = partial(context.run, task)
        del task
        self._wait()
        own = contextvars.copy_context()
        for variable, value in context.items():
            if variable not in own or own[variable] is not value:
                variable.set(value)
        (result, error), self._answer = self._answer, (None, None)
        if error is not None:
            raise error
        return result

    def cancel(self) -> None:
        """End it where it waits, or where it would wait next."""
        self._cancelled = True
        self.module, self._inputs = None, ((), {})
        self._go.put(None)
        if self._begun.wait(_BEGIN if self._asked else 0):  # an interrupt within `start` may be faster than the thread
            self.join()

    def run(self) -> None:
        """What the thread does."""
        self._begun.set()
        try:
            if not self._cancelled:
                self._context.run(self._pass)
        except _Cancelled:
            pass
        except BaseException as error:  # raised again by `advance`, in the thread that waits
            self._error = error
        finally:
            self._paused.put(None)

    def _pass(self) -> None:
        with torch.no_grad(), naming_batch(self._model, self.batch, self.number):
            self._model(**self._send(self.batch))

    def _proceed(self) -> None:
        if not self._asked:
            self._asked = True
            self.start()
        else:
            self._go.put(None)
        self._paused.get()
        while self._task is not None:
            self._answer = self._attempt()
            self._go.put(None)
            self._paused.get()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _attempt(self) -> tuple[Any, BaseException | None]:
        task, self._task = self._task, None
        assert task is not None
        try:
            with torch.no_grad():
                return task(), None
        except BaseException as error:  # raised again by `hand_over`, in the pass
            return None, error

    def _wait(self) -> None:
        if not self._cancelled:
            self._paused.put(None)
            self._go.get()
        if self._cancelled:
            raise _Cancelled
        torch.clear_autocast_cache()  # weights may have changed


class PausedPasses:
    """The forward passes of all batches, which wait at some modules until all have come there.

    Args:
        model: The model.
        batches: The batches.
        holds: The modules to wait at; each is passed without waiting once it was released.
        send: Brings a batch to the model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        holds: Collection[nn.Module],
        send: Callable[[Mapping[str, Any]], Any],
    ) -> None:
        """See the class."""
        self._holds = set(holds)
        self._memory = PagedMemory()
        self._passes = [PausedPass(model, batch, number, send) for number, batch in enumerate(batches)]
        self._handles = [module.register_forward_pre_hook(self._pause, with_kwargs=True) for module in self._holds]
        parts = _find_beside(model, self._holds) | self._holds if find_device(model).type == "cpu" else set()
        self._forwards = [ReplacedForward(part, self._run) for part in parts]

    def __deepcopy__(self, memo: Any) -> PausedPasses:
        """Itself: a model may copy its modules, whose forward methods come here."""
        return self

    def start(self) -> None:
        """Run all to the first module that they wait at."""
        for forward in self._forwards:
            forward.replace()
        self._advance(self._passes)

    def waiting_at(self, module: nn.Module) -> list[PausedPass]:
        """The passes that wait at a module; some have not come to it, where it is run for some inputs only."""
        return [one for one in self._passes if one.module is module]

    def run_module(self, one: PausedPass, watch: AbstractContextManager[Any]) -> None:
        """Run the module at which a pass waits, which stays where it is.

        Args:
            one: The pass.
            watch: What to run it in.
        """
        one.run_module(watch)
        self._memory.page_out()

    def release(self, module: nn.Module) -> None:
        """Let all that wait at a module go on to the next, and none wait there again."""
        self._holds.discard(module)
        self._advance(self.waiting_at(module))

    def close(self) -> None:
        """End all of them."""
        for one in self._passes:
            one.cancel()
        for handle in self._handles:
            handle.remove()
        for forward in self._forwards:
            forward.put_back()
        self._memory.close()

    def _advance(self, passes: Sequence[PausedPass]) -> None:
        for one in passes:
            one.advance()
            self._memory.page_out()
        if hasattr(psutil, "heap_trim"):  # not with every C library
            psutil.heap_trim()

    def _pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        current = self._find_pass()
        if current is not None and module in self._holds:
            current.pause(module, args, kwargs)

    def _find_pass(self) -> PausedPass | None:
        """The pass that this thread is, if it is one of these and runs no module beside itself."""
        current = threading.current_thread()
        if isinstance(current, PausedPass) and current in self._passes and not current.is_ordered:
            return current
        return None

    def _run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What is done in place of the forward method of a module at which passes wait, or of one beside those.

        In a pass, what it gives is moved out of memory, but for what shares memory with its inputs, its weights or
        other outputs. What it also keeps for itself is then another tensor.
        """
        current = self._find_pass()
        if current is None or not is_plain() or not self._holds.isdisjoint(module.modules()):  # it is to wait in it
            return forward(*args, **kwargs)
        output = current.hand_over(partial(forward, *args, **kwargs))
        given = output if type(output) is tuple else (output,)
        others = (*tree_leaves((args, kwargs)), *module.parameters(), *module.buffers())
        places = [_find_storage(value) for value in (*given, *others)]
        moved = [
            value if place is None or places.count(place) > 1 else self._memory.move(value)
            for value, place in zip(given, places, strict=False)
        ]
        return tuple(moved) if type(output) is tuple else moved[0]


def _run_within(watch: AbstractContextManager[Any], module: nn.Module, args: Any, kwargs: Any) -> None:
    """Run a module until enough was seen, on copies of its inputs, since some write to them."""
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with watch:
            module(*args, **kwargs)
    except Enough:
        pass


def _find_beside(model: nn.Module, holds: Collection[nn.Module]) -> set[nn.Module]:
    """The largest modules that neither are within those to wait at nor around them."""
    around = {module for module in model.modules() if not set(module.modules()).isdisjoint(holds)}
    beside = {part for module in around - set(holds) for part in module.children()} - around
    return {module for module in beside if not isinstance(module, torch.jit.ScriptModule)}


def _find_storage(value: Any) -> int | None:
    """Where the values of a plain tensor lie; None for all else."""
    plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_nested
    return value.untyped_storage().data_ptr() if plain else None


@contextmanager
def paused(*args: Any) -> Iterator[PausedPasses]:
    """`PausedPasses` that end whatever happens; they have been started."""
    passes = PausedPasses(*args)
    try:
        passes.start()
        yield passes
    finally:
        finish(passes.close)
