"""A forward method that does something else for a while."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import new_class
from typing import Any

import torch
from torch import nn

Run = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]
"""Takes a module, its forward method and the arguments, and gives what the module is to give."""


class ReplacedForward:
    """Has one module do something else in place of its forward method, by a class of its own.

    A copy of the module does the same with itself. A forward method that is set on the module itself is not replaced.

    Args:
        module: The module.
        run: What is done instead.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        """See the class."""
        kind = type(module)
        self._module, self._kind = module, kind

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # what is compiled is the module's own
                return kind.forward(self, *args, **kwargs)
            return run(self, partial(kind.forward, self), args, kwargs)

        names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        self._replaced = new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))

    def replace(self) -> None:
        """Do that from now on."""
        self._module.__class__ = self._replaced

    def put_back(self) -> None:
        """As it was; can be done twice."""
        if type(self._module) is self._replaced:
            self._module.__class__ = self._kind
