"""Forward passes that wait at modules, one for each batch, so that a model can be changed while they are under way."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .calibration_batches import naming_batch
from .kept_weights import finish

_BEGIN = 1.0
"""Seconds in which a thread that was asked to begin has begun, if it ever does."""


class _Cancelled(BaseException):
    """Ends a pass that nobody needs any more."""


class Enough(BaseException):
    """Ends a run of a module in which all has been seen."""


class PausedPass(threading.Thread):
    """One forward pass, in a thread of its own, which runs only while `advance` waits for it.

    Args:
        call: The pass.
        batch: What the model is given in it.
        number: The number of the batch.
    """

    def __init__(self, call: Callable[[], Any], batch: Mapping[str, Any], number: int) -> None:
        """See the class."""
        super().__init__(daemon=True, name="hf_slim-pass")
        self.batch, self.number = batch, number
        self.module: nn.Module | None = None
        self._call = call
        self._inputs: tuple[Any, Any] = ((), {})
        self._context = contextvars.copy_context()
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._asked, self._begun = False, threading.Event()
        self._error: BaseException | None = None
        self._cancelled = False

    def advance(self) -> None:
        """Let it run until it waits at a module, or ends; raises what it raises."""
        self.module, self._inputs = None, ((), {})
        if not self._asked:
            self._asked = True
            self.start()
        else:
            self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def run_module(self) -> Any:
        """Run the module that it waits at, on what it waits with; the pass itself stays where it is."""
        assert self.module is not None
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, self._inputs)  # some modules write to their inputs
        try:
            return self.module(*args, **kwargs)
        except Enough:
            return None

    def pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Wait at a module; called in the thread itself."""
        self.module, self._inputs = module, (args, kwargs)
        self._paused.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """End it where it waits, or at the next module at which it would."""
        self._cancelled = True
        self.module, self._inputs = None, ((), {})
        self._go.release()
        if self._begun.wait(_BEGIN if self._asked else 0):  # an interrupt within `start` may be faster than the thread
            self.join()

    def run(self) -> None:
        """What the thread does."""
        self._begun.set()
        try:
            with torch.no_grad():
                if not self._cancelled:
                    self._context.run(self._call)
        except _Cancelled:
            pass
        except BaseException as error:  # raised again by `advance`, in the thread that waits
            self._error = error
        finally:
            self._paused.release()


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
        send: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        """See the class."""
        self._model, self._send = model, send
        self._holds = set(holds)
        self._passes = [
            PausedPass(self._make_call(batch, number), batch, number) for number, batch in enumerate(batches)
        ]
        self._handles = [module.register_forward_pre_hook(self._pause, with_kwargs=True) for module in self._holds]

    def start(self) -> None:
        """Run all to the first module that they wait at."""
        for one in self._passes:
            one.advance()

    def waiting_at(self, module: nn.Module) -> list[PausedPass]:
        """The passes that wait at a module; some have not come to it, where it is run for some inputs only."""
        return [one for one in self._passes if one.module is module]

    def release(self, module: nn.Module) -> None:
        """Let all that wait at a module go on to the next, and none wait there again."""
        self._holds.discard(module)
        for one in self.waiting_at(module):
            one.advance()

    def close(self) -> None:
        """End all of them."""
        for handle in self._handles:
            handle.remove()
        for one in self._passes:
            one.cancel()

    def _make_call(self, batch: Mapping[str, Any], number: int) -> Callable[[], Any]:
        def call() -> None:
            with naming_batch(self._model, batch, number):
                self._model(**self._send(batch))

        return call

    def _pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        thread = threading.current_thread()
        if isinstance(thread, PausedPass) and module in self._holds:
            thread.pause(module, args, kwargs)


@contextmanager
def paused(*args: Any) -> Iterator[PausedPasses]:
    """`PausedPasses` that end whatever happens; they have been started."""
    passes = PausedPasses(*args)
    try:
        passes.start()
        yield passes
    finally:
        finish(passes.close)
