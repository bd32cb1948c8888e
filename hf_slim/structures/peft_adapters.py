"""Adapters that are trained beside frozen layers: what the layouts do not explain of them, and merging them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .linear_layers import BASE, find_layer, join, tensors_outside
from .structure import Structure, get_module

REMEDY = (
    "Merge the adapters first (model = model.merge_and_unload()), or slim the model first and add adapters to the "
    "slim model."
)
_LOW_RANK_TYPE = "LORA"
_COPIES = "modules_to_save"


def has_adapters(model: nn.Module) -> bool:
    """Whether a module has adapters in it, explained or not."""
    return any(BASE in module._modules or _adapter_types(module) for module in model.modules())


def find_obstacle(model: nn.Module, structure: Structure) -> str | None:
    """Say why a structure cannot be slimmed with the adapters that are there, or with weights stored otherwise.

    Low-rank adapters of linear layers are explained: they are members of the structure.

    Args:
        model: The model that the structure was found in.
        structure: One of its structures.

    Returns:
        The reason, None if the structure has plain weights and no adapters, or only such.
    """
    modules = dict.fromkeys(path for m in structure.members for path in _path(m.tensor))
    return next((reason for path in modules for reason in _find_reasons(model, path)), None)


def merge_adapters(model: Any) -> Any:
    """Add the active adapters to the weights beside them and leave the plain model.

    Args:
        model: A model with adapters around it or in it, or a module that holds such; changed in place.

    Returns:
        The model without adapters; the same if it has none.

    Raises:
        ValueError: If the adapters cannot be merged.
    """
    if _adapter_types(model) and not isinstance(model, PreTrainedModel):
        if not hasattr(model, "merge_and_unload"):
            kinds = ", ".join(_adapter_types(model))
            raise ValueError(
                f"The {kinds} adapters of {type(model).__name__} cannot be merged into its weights, so it cannot be "
                "saved as a plain model: slim the model first and add adapters to the slim model."
            )
        return model.merge_and_unload(safe_merge=True)
    for name, child in list(model.named_children()):
        if BASE in child._modules:
            child.merge(safe_merge=True)
            setattr(model, name, child.get_base_layer())
        elif _COPIES in child._modules and hasattr(child, "unload_and_optionally_merge_module"):
            setattr(model, name, child.unload_and_optionally_merge_module(True, True, None))
        else:
            setattr(model, name, merge_adapters(child))
    if isinstance(model, PreTrainedModel) and _adapter_types(model):
        del model.peft_config
        model._hf_peft_config_loaded = False
        vars(model).pop("_weight_conversions", None)  # those of the adapter's file, by which its names would be saved
    return model


def _find_reasons(model: nn.Module, path: str) -> Iterator[str]:
    module = get_module(model, path)
    if isinstance(module, nn.Linear):
        weight, shape = module.weight, (module.out_features, module.in_features)
        if weight.shape != shape or not weight.is_floating_point():
            yield (
                f"the weight of {path} is {weight.dtype} of shape {tuple(weight.shape)} instead of floating-point "
                f"numbers of shape {shape}, as after quantization: slim the model before"
            )
    for name, parameter in module._parameters.items():
        if parameter is not None and not _is_plain(parameter):
            yield (
                f"{join(path, name)} is kept as {type(parameter).__name__}, a kind of tensor of its own, as after "
                "quantization: slim the model before"
            )
    for kind in _adapter_types(module):
        if kind != _LOW_RANK_TYPE:
            yield f"the model has adapters of the type {kind}, and no layout says how they depend on the units"
    if _COPIES in module._modules and "original_module" in module._modules:
        yield f"{path} holds copies of it ({_COPIES}), of which only one is used"
    if BASE not in module._modules:
        return
    for variant in module.__dict__.get("lora_variant", {}).values():
        yield f"{path} has an adapter of another kind than plain LoRA ({type(variant).__name__})"
    layer = find_layer(model, path)
    known = {name for pair in layer.adapters for name in pair} if layer is not None else set()
    for name, _ in tensors_outside(module, (BASE,)):
        if join(path, name) not in known:
            yield f"{join(path, name)} changes what {path}.{BASE} computes, and no layout says how"


def _is_plain(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds its numbers as they are: by itself, or a part of them in each process."""
    kind = type(parameter)
    if kind.__module__.startswith(("torch.distributed.", "torch._subclasses.")):
        return True
    return nn.Parameter in kind.__mro__ and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _adapter_types(module: nn.Module) -> list[str]:
    """The types of the adapters that a model says it has."""
    configs = getattr(module, "peft_config", None)
    configs = configs.values() if isinstance(configs, dict) else ()
    return [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs]


def _path(tensor: str) -> list[str]:
    """The dotted names of the modules around a tensor, outermost first, the model's own empty name among them."""
    parts = tensor.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]
