"""What a model was given and what it gave while a loss was computed, whatever computes it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from transformers import PreTrainedModel

from ..training import find_entries


@dataclass
class Call:
    """One call of a module.

    Args:
        path: Dotted name of the module in the model, empty for the model itself.
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
        inner: The calls of transformers models in it, in the order of their beginning.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    inner: list[Call] = field(default_factory=list)

    def walk(self) -> Iterator[Call]:
        """This call and those in it, the outer before the inner."""
        yield self
        for call in self.inner:
            yield from call.walk()


@contextmanager
def watch_calls(
    model: nn.Module,
    called: nn.Module | None = None,
    *,
    hidden: bool = False,
    total: torch.Tensor | None = None,
) -> Iterator[list[Call]]:
    """See the outermost calls of a model or of models in it that have a gradient, if gradients are on.

    Usually that is one call of the model. A loss may also call it several times, or a transformers model inside it.

    Args:
        model: The model.
        called: What stands for it where it is called, if that is compiled.
        hidden: Whether transformers models are asked for their hidden states, too.
        total: What models are given in place of any `num_items_in_batch`.

    Yields:
        The calls, which come as they are made.
    """
    calls: list[Call] = []
    watch = _Watch(calls, hidden, torch.is_grad_enabled(), total)
    with ExitStack() as stack:
        if called is not None and is_compiled_module(called):
            stack.enter_context(_watch_hooked(called, watch))
        else:
            for path, module in {id(module): (path, module) for path, module in find_entries(model)}.values():
                stack.enter_context(_watch_method(path, module, watch))
        yield calls


class _Watch:
    """The calls that have begun and not ended."""

    def __init__(self, calls: list[Call], hidden: bool, with_grad: bool, total: torch.Tensor | None) -> None:
        self._calls, self._hidden, self._with_grad, self._total = calls, hidden, with_grad, total
        self._open: list[Call] = []

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Begin a call, and say with which keyword arguments it is made."""
        if self._total is not None and "num_items_in_batch" in kwargs:
            kwargs = {**kwargs, "num_items_in_batch": self._total}  # wrappers may have cast that which they were given
        is_outer = not any(is_transformer(call.module) for call in self._open)
        # Modules of sentence-transformers write into the dictionary that they are given.
        kept = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
        call = Call(path, module, kept, dict(kwargs))
        is_kept = torch.is_grad_enabled() == self._with_grad
        if self._open:
            self._open[-1].inner.append(call)
        elif is_kept:
            self._calls.append(call)
        self._open.append(call)
        if not (self._hidden and is_outer and is_kept and is_transformer(module)):
            return kwargs
        _require_hidden_states(module)
        return {**kwargs, "output_hidden_states": True}

    def leave(self, output: Any) -> None:
        """End a call."""
        self._open.pop().output = dict(output) if type(output) is dict else output


@contextmanager
def _watch_method(path: str, module: Any, watch: _Watch) -> Iterator[None]:
    """Watch a module by its method: sentence-transformers and PEFT call `forward` itself, without hooks."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **watch.enter(path, module, args, kwargs))
        watch.leave(output)
        return output

    with replacing_forward(module, forward):
        yield


@contextmanager
def replacing_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put a method in the place of a module's `forward`, and what was there back.

    Args:
        module: The module.
        forward: The method.

    Yields:
        Nothing.
    """
    own = vars(module).get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


@contextmanager
def _watch_hooked(module: nn.Module, watch: _Watch) -> Iterator[None]:
    """Watch a compiled module from outside, since what is put into it would be compiled, too."""

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, watch.enter("", module, args, kwargs)

    def leave(_: Any, args: Any, output: Any) -> None:
        watch.leave(output)

    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_transformer(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, compiled or not."""
    return isinstance(getattr(module, "_orig_mod", module), PreTrainedModel)


def _require_hidden_states(module: nn.Module) -> None:
    forward = getattr(module, "_orig_mod", module).forward
    parameters = inspect.signature(forward).parameters
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "output_hidden_states" not in parameters and not takes_all:
        raise ValueError(
            f"{type(module).__name__}.forward takes no output_hidden_states, so that its hidden states cannot be "
            "compared with a teacher's: leave slim_hidden_weight at 0."
        )
