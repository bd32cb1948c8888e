"""Forward passes that wait at modules, one for each batch, so that a model can be changed while they are under way."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..parallel import find_device
from .calibration_batches import naming_batch
from .kept_weights import finish
from .paged_memory import PagedMemory


class Enough(BaseException):
    """Ends a run of a module in which all has been seen."""


@dataclass(frozen=True)
class Modes:
    """What PyTorch keeps for a thread that changes how it computes, of which a pass that waits must leave nothing.

    Args:
        is_inference: Whether in `torch.inference_mode`.
        has_grad: Whether gradients are recorded.
        autocast: For each type of device whether `torch.autocast` is on, and for which dtype.
    """

    is_inference: bool
    has_grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def read(cls, devices: Collection[str]) -> Modes:
        """What they are now, for these types of devices."""
        autocast = tuple((name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices)
        return cls(torch.is_inference_mode_enabled(), torch.is_grad_enabled(), autocast)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Compute in these modes; what autocast has cast of weights is cast anew in them, and after them."""
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.inference_mode(self.is_inference))
            stack.enter_context(torch.set_grad_enabled(self.has_grad))
            for name, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(name, dtype=dtype, enabled=enabled))
            torch.clear_autocast_cache()
            yield


class PausedPass(greenlet):
    """One forward pass, with a stack of its own, which runs only while `advance` waits for it.

    All passes run in one thread, since libraries for products keep memory for each thread that they have run in.

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
        """The pass."""
        with torch.no_grad(), naming_batch(self._model, self.batch, self.number):
            self._model(**self._send(self.batch))

    def advance(self) -> None:
        """Let it run until it waits at a module, or ends; raises what it raises."""
        self.module, self._inputs = None, ((), {})
        self._outside = Modes.read(self._devices)
        self.switch()
        self._memory.page_out()

    def run_module(self) -> Any:
        """Run the module that it waits at, on what it waits with; the pass itself stays where it is."""
        assert self.module is not None
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, self._inputs)  # some modules write to their inputs
        try:
            with self._inside.enter():
                return self.module(*args, **kwargs)
        except Enough:
            return None
        finally:
            self._memory.page_out()

    def pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Wait at a module; called in the pass itself."""
        if not self._cancelled:
            self.module, self._inputs = module, (args, kwargs)
            self._inside = Modes.read(self._devices)
            assert self.parent is not None
            with self._outside.enter():
                self.parent.switch()
        if self._cancelled:
            raise GreenletExit

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

    def _pause(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        current = getcurrent()
        if isinstance(current, PausedPass) and module in self._holds:
            current.pause(module, args, kwargs)

    def _page(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Move what a module gives in a pass out of memory, but for what it was given itself."""
        if not isinstance(getcurrent(), PausedPass):
            return None
        given = {_find_storage(value) for value in tree_leaves((args, kwargs))}
        found, structure = tree_flatten(output)
        copies = {id(value): self._memory.copy(value) for value in found if _find_storage(value) not in (None, *given)}
        return tree_unflatten([copies.get(id(value), value) for value in found], structure) if copies else None


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
