"""Weights that `from_pretrained` made up, since the files had none, and that nobody has trained since."""

from __future__ import annotations

import weakref

import torch
from torch import nn

_SAMPLE = 16
_samples: weakref.WeakKeyDictionary[nn.Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()


def remember_fresh(model: nn.Module) -> None:
    """Remember which weights of a model that was loaded just now are not from its files.

    transformers marks those that are.

    Args:
        model: What `from_pretrained` gives.
    """
    is_loaded = {name: hasattr(parameter, "_is_hf_initialized") for name, parameter in model.named_parameters()}
    if any(is_loaded.values()) and not all(is_loaded.values()):
        fresh = {name: p for name, p in model.named_parameters() if not is_loaded[name] and not p.is_meta}
        _samples[model] = {name: _sample(parameter) for name, parameter in fresh.items()}


def find_untrained(model: nn.Module) -> list[str]:
    """Find the weights of a model, or of a model in it, that are as `from_pretrained` made them up.

    Args:
        model: Any module. Of models that were built otherwise nothing is known.

    Returns:
        Their dotted names, in the order of the parameters.
    """
    found = []
    for path, module in model.named_modules():
        samples = _samples.get(module, {})
        for name, parameter in module.named_parameters() if samples else ():
            if name in samples and torch.equal(_sample(parameter), samples[name]):
                found.append(f"{path}.{name}" if path else name)
    return found


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().flatten()[:_SAMPLE].float().cpu().clone()
