"""What PyTorch keeps for a thread that changes how it computes."""

from __future__ import annotations

import torch


def is_plain() -> bool:
    """Whether this thread computes without gradients and nothing else that another thread would not do.

    Returns:
        False within function or dispatch modes (`with torch.device(...)` is one), transforms of `torch.func`,
        inference mode, autocast, tracing, or with gradients.
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.jit.is_tracing()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
