"""The batch of a training step: how the model was called in it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel


class Call(NamedTuple):
    """One call of a module.

    Args:
        path: Dotted name of the module in the model, empty for the model itself.
        args: Positional arguments; tensors are copies without a graph.
        kwargs: Keyword arguments.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Capture:
    """Keeps the last call of the outermost modules that are called in a training step.

    Usually that is the model. A loss may also call a transformers model inside it by itself, or several of them. Calls
    without gradients, as for a metric, do not replace those with gradients. Calls that go on from a cache are not
    kept: they change it, and a model with fewer heads cannot read it.
    """

    def __init__(self) -> None:
        """Nothing is watched yet."""
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, Call] = {}
        self._with_gradients: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy or pickle of a model that is watched nothing is kept."""
        return Capture, ()

    def begin(self, model: nn.Module, called: nn.Module | None = None) -> None:
        """Watch the model from here on.

        Args:
            model: The model.
            called: What stands for the model where it is called: the model as torch.compile has wrapped it.
        """
        self.end()
        entries = [("", called)] if called is not None and called is not model else find_entries(model, "")
        for path, module in entries:
            hook = partial(self._keep, path)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def end(self) -> list[Call]:
        """Watch the model no longer.

        Returns:
            The calls; empty if no module was called, or none was watched.
        """
        for handle in self._handles:
            handle.remove()
        calls = list(self._calls.values())
        self._handles, self._calls, self._with_gradients = [], {}, set()
        return calls

    def _keep(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._handles or _has_cache(args, kwargs):
            return
        if torch.is_grad_enabled():
            for other in self._calls.keys() - self._with_gradients:
                if not other or path.startswith(f"{other}."):
                    del self._calls[other]
            self._with_gradients.add(path)
        elif path in self._with_gradients:
            return
        is_inside = any(path != outer and (not outer or path.startswith(f"{outer}.")) for outer in self._calls)
        if not is_inside:
            self._calls[path] = Call(path, *tree_map(_copy, (args, kwargs)))


def find_entries(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Find the modules that a loss may call: the model, and the transformers models in it.

    What is compiled is not looked into, since hooks would be compiled, too.

    Args:
        module: The model, or a module in it.
        path: Its dotted name in the model.

    Yields:
        Dotted names and modules.
    """
    is_compiled = is_compiled_module(module)
    if not path or is_compiled or isinstance(module, PreTrainedModel):
        yield path, module
    if not is_compiled:
        for name, child in module.named_children():
            yield from find_entries(child, f"{path}.{name}" if path else name)


def _has_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    given = (*args, *kwargs.values())
    return kwargs.get("past_key_values") is not None or any(isinstance(value, Cache) for value in given)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
