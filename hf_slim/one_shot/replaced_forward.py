"""A forward method that does something else for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Run = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]
"""Takes the module, its forward method, and the arguments; gives what the module is to give."""


class ReplacedForward:
    """Replaces the forward method of one module, as accelerate does for modules that it offloads.

    Args:
        module: The module.
        run: What is done instead.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        """See the class."""
        self._module, self._run = module, run
        self._own = vars(module).get("forward")
        self._replaced = False

    def replace(self) -> None:
        """Do that from now on."""
        forward: Callable[..., Any] = self._module.forward

        @functools.wraps(forward)
        def instead(*args: Any, **kwargs: Any) -> Any:
            return self._run(self._module, forward, args, kwargs)

        self._replaced = True
        vars(self._module)["forward"] = instead

    def put_back(self) -> None:
        """As it was; can be done twice."""
        if self._replaced:
            vars(self._module).pop("forward", None)
            if self._own is not None:
                vars(self._module)["forward"] = self._own
        self._replaced = False
