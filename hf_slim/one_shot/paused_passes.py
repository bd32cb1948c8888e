"""Forward passes that wait at modules, one for each batch, so that a model can be changed while they are under way."""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import psutil
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..parallel import find_device
from .calibration_batches import naming_batch
from .kept_weights import finish
from .paged_memory import PagedMemory
from .thread_modes import Modes


class Enough(BaseException):
    """Ends a run of a module in which all has been seen."""


class PausedPass(greenlet):
    """One forward pass, with a stack of its own, which runs only while `advance` waits for it.

    All passes run in one thread, since MKL, OpenMP and the allocator keep memory for each thread that has computed.

    Args:
        model: The model.
        batch: What it is given.
        number: The number of the batch.
        send: Brings a batch to the model's device.
        memory: Where what it holds while it waits may lie.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        number: int,
        send: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        memory: PagedMemory,
    ) -> None:
        """See the class."""
        super().__init__()
        self.gr_context = contextvars.copy_context()
        self.batch, self.number = batch, number
        self.module: nn.Module | None = None
        self._model, self._send, self._memory = model, send, memory
        self._inputs: tuple[Any, Any] = ((), {})
        self._devices = dict.fromkeys(("cpu", find_device(model).type))
        self._outside = self._inside = Modes.read(self._devices)
        self._cancelled = False

    def run(self) -> None:
        """The pass; what it raises when it is to end is nobody's concern, but for an interrupt."""
        try:
            with torch.no_grad(), naming_batch(self._model, self.batch, self.number):
                self._model(**self._send(self.batch))
        except BaseException as error:
            if not self._cancelled or isinstance(error, KeyboardInterrupt):
                raise

    def advance(self) -> None:
        """Let it run until it waits at a module, or ends; raises what it raises."""
        self.module, self._inputs = None, ((), {})
        self._outside = Modes.read(self._devices)
        self.switch()
        self._memory.page_out()

    def run_module(self, watch: AbstractContextManager[Any]) -> Any:
        """Run the module that it waits at, on what it waits with; the pass itself stays where it is.

        Args:
            watch: What to run it in.

        Returns:
            What the module gives; None if `watch` had seen enough before.
        """
        assert self.module is not None
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, self._inputs)  # some modules write to their inputs
        try:
            with self._inside.enter(), watch:
                return self.module(*args, **kwargs)
        except Enough:
            return None
        finally:
            self._memory.page_out()

    def pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Wait at a module; called in the pass itself."""
        if self._cancelled:  # and has caught that
            raise GreenletExit
        self.module, self._inputs = module, (args, kwargs)
        self._inside = Modes.read(self._devices)
        assert self.parent is not None
        with self._outside.enter():
            self.parent.switch()

    def cancel(self) -> None:
        """End it where it waits, or where it would wait next."""
        self._cancelled = True
        self.module, self._inputs = None, ((), {})
        if not self.dead:
            self.throw(GreenletExit)


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
        self._holds = set(holds)
        self._memory = PagedMemory()
        self._passes = [PausedPass(model, batch, number, send, self._memory) for number, batch in enumerate(batches)]
        self._handles = [module.register_forward_pre_hook(self._pause, with_kwargs=True) for module in self._holds]
        for module in _find_beside(model, self._holds) | self._holds:
            self._handles.append(module.register_forward_hook(self._page, with_kwargs=True))

    def start(self) -> None:
        """Run all to the first module that they wait at."""
        self._advance(self._passes)

    def waiting_at(self, module: nn.Module) -> list[PausedPass]:
        """The passes that wait at a module; some have not come to it, where it is run for some inputs only."""
        return [one for one in self._passes if one.module is module]

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
        self._memory.close()

    @staticmethod
    def _advance(passes: Sequence[PausedPass]) -> None:
        for one in passes:
            one.advance()
        if hasattr(psutil, "heap_trim"):  # not with every C library
            psutil.heap_trim()

    def _pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        current = getcurrent()
        if isinstance(current, PausedPass) and module in self._holds:
            current.pause(module, args, kwargs)

    def _page(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Move what a module gives in a pass out of memory, but for what shares it with its inputs or other outputs.

        What it also keeps for itself is then another tensor.
        """
        if not isinstance(getcurrent(), PausedPass):
            return None
        found, structure = tree_flatten(output)
        places = [_find_storage(value) for value in (*found, *tree_leaves((args, kwargs)))]
        moved = [
            value if place is None or places.count(place) > 1 else self._memory.move(value)
            for value, place in zip(found, places, strict=False)
        ]
        return None if all(map(operator.is_, moved, found)) else tree_unflatten(moved, structure)


def _find_beside(model: nn.Module, holds: Collection[nn.Module]) -> set[nn.Module]:
    """The largest modules that are neither within those to wait at nor around them."""
    around = {module for module in model.modules() if not set(module.modules()).isdisjoint(holds)}
    return {part for module in around - set(holds) for part in module.children()} - around


def _find_storage(value: Any) -> int | None:
    """Where the values of a plain tensor lie; None for all else."""
    plain = type(value) is torch.Tensor and value.layout == torch.strided
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
