"""What PyTorch keeps for a thread that changes how it computes, so that passes in one thread keep theirs apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Modes:
    """Gradient mode, inference mode, autocast and function modes (`with torch.device(...)` is one).

    Args:
        is_inference: Whether in `torch.inference_mode`.
        has_grad: Whether gradients are recorded.
        autocast: For each type of device whether `torch.autocast` is on, and for which dtype.
        caches: Whether autocast keeps what it has cast of weights.
        functions: The function modes, the outermost first.
    """

    is_inference: bool
    has_grad: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    caches: bool
    functions: tuple[Any, ...]

    @classmethod
    def read(cls, devices: Collection[str]) -> Modes:
        """What they are now.

        Args:
            devices: Types of devices, for autocast.
        """
        functions = tuple(_exchange_functions(()))
        _exchange_functions(functions)
        return cls(
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            tuple((name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices),
            torch.is_autocast_cache_enabled(),
            functions,
        )

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Compute in these modes. What autocast has cast of weights meanwhile is cast anew afterwards."""
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            stack.callback(_exchange_functions, _exchange_functions(self.functions))
            stack.enter_context(torch.inference_mode(self.is_inference))
            stack.enter_context(torch.set_grad_enabled(self.has_grad))
            for name, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(name, dtype=dtype, enabled=enabled, cache_enabled=self.caches))
            yield


def _exchange_functions(modes: Sequence[Any]) -> list[Any]:
    """Set the function modes of this thread; gives those there were, the outermost first."""
    before = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    return before[::-1]
