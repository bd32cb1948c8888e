"""Whether a model has attention or feed-forward networks of linear layers, told without hf_slim."""

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D


def has_modules(model: nn.Module, kind: str) -> bool:
    """Whether blocks of the model hold attention or feed-forward networks of linear layers, by names and shapes."""
    for name, module in model.named_modules():
        if not any(part.isdigit() for part in name.split(".")):
            continue
        class_name = type(module).__name__
        attention = re.search(r"Attention|Attn", class_name) is not None
        if kind == "mha":
            if attention and len(_linear(module.modules())) >= 2:
                return True
        elif not attention:
            if re.search(r"MLP|Mlp|FeedForward|FFN", class_name) and len(_linear(module.modules())) >= 2:
                return True
            if _mirrored(_linear(module.children())) or "Intermediate" in class_name and _linear(module.modules()):
                return True
    return False


def _linear(modules: Iterable[nn.Module]) -> list[tuple[int, ...]]:
    """Inputs and outputs of the linear layers."""
    layers = [m for m in modules if isinstance(m, (nn.Linear, Conv1D)) and m.weight.dim() == 2]
    return [tuple(m.weight.shape if isinstance(m, Conv1D) else m.weight.shape[::-1]) for m in layers]


def _mirrored(layers: list[tuple[int, ...]]) -> bool:
    """Whether one layer widens what another narrows again."""
    return any(outputs > inputs and (outputs, inputs) in layers for inputs, outputs in layers)
