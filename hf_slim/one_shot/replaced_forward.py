"""A forward method that does something else for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class ReplacedForward:
    """Replaces the forward method of one module, as accelerate does for modules that it offloads.

    Args:
        module: The module.
        run: What is done instead; takes the module, its forward method, and what that takes. Copies of the module do
            the same with themselves.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        """See the class."""
        self._module, self._run = module, run
        self._own = vars(module).get("forward")
        self._replaced = False

    def replace(self) -> None:
        """Do that from now on."""
        forward = self._module.forward
        self._replaced = True
        vars(self._module)["forward"] = functools.update_wrapper(
            functools.partial(self._run, self._module, forward), forward
        )

    def put_back(self) -> None:
        """As it was; can be done twice."""
        if self._replaced:
            vars(self._module).pop("forward", None)
            if self._own is not None:
                vars(self._module)["forward"] = self._own
        self._replaced = False
