"""Weights that accelerate keeps elsewhere, in CPU memory or on disk, until a module's forward pass needs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import nn

from ..structures import get_tensor

_FOLDER = "_hf_slim_folder"
"""Where a loader of a copy of a model keeps the folder for what is changed in the copy."""


class _Kept(NamedTuple):
    """Where the values of a tensor are that is on the meta device between forward passes."""

    weights: Any
    key: str


def read_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The values of a parameter or buffer, wherever they are kept.

    Args:
        model: Any module.
        name: For example `encoder.layer.0.output.dense.weight`.

    Returns:
        The tensor itself, or what is kept for it; read only.

    Raises:
        ValueError: If it has no values.
    """
    tensor = get_tensor(model, name)
    if not tensor.is_meta:
        return tensor
    kept = _require_kept(model, name)
    return kept.weights[kept.key]


@torch.no_grad()
def change_tensor(model: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give a parameter or buffer other values, maybe of another shape, and keep them where the old ones were.

    What is on disk is written to the offload folder as a file of its own; the files that the model was loaded from
    stay as they are.

    Args:
        model: The model; changed in place. The Parameter object stays the same.
        name: Dotted name of the tensor.
        change: Makes the new tensor from the old one, which it leaves as it is.

    Raises:
        ValueError: If what is kept elsewhere cannot be changed there.
    """
    tensor = get_tensor(model, name)
    kept = _find_kept(model, name) if tensor.is_meta else None
    if kept is None:
        changed = change(tensor.data)
        if tensor.requires_grad and changed.shape != tensor.shape:
            # Autograd keeps the shape as long as anything holds the graph of an earlier step; another type resets it.
            other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
            tensor.data = changed.new_empty(0, dtype=other)
        tensor.data = changed
        return
    _refuse_unchangeable(model, name, kept)
    changed = change(kept.weights[kept.key])
    if not isinstance(kept.weights, OffloadedWeightsLoader):
        kept.weights[kept.key] = changed
    elif kept.key in kept.weights.state_dict:
        kept.weights.state_dict[kept.key] = changed
    else:
        kept.weights.index[kept.key] = _write(_folder_of(kept.weights), kept.key, changed)
    tensor.data = torch.empty_like(changed, device="meta")


def is_offloaded(model: nn.Module, name: str) -> bool:
    """Whether the values of a parameter or buffer are kept elsewhere.

    Args:
        model: Any module.
        name: Dotted name of the tensor.

    Returns:
        True if accelerate keeps them; False for a tensor that has its values, and for one that has none at all.
    """
    return get_tensor(model, name).is_meta and _find_kept(model, name) is not None


def check_values(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse tensors that have no values, and those that are kept elsewhere and cannot be changed there.

    Args:
        model: The model.
        names: Dotted names of tensors.

    Raises:
        ValueError: If there is such a tensor.
    """
    for name in names:
        if get_tensor(model, name).is_meta:
            _refuse_unchangeable(model, name, _require_kept(model, name))


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate runs a model by a `device_map`, on several devices or with weights that it keeps elsewhere.

    Args:
        model: A transformers model.

    Returns:
        True if the model has such a map and hooks that follow it.
    """
    return hasattr(model, "hf_device_map") and any(_hooks_of(module) for module in model.modules())


def refuse_unmapped(model: nn.Module) -> None:
    """Refuse to save a model with weights kept elsewhere that has no `device_map`, by which transformers sees them.

    Args:
        model: The model.

    Raises:
        ValueError: If there are such weights.
    """
    if hasattr(model, "hf_device_map"):
        return
    name = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if name is not None and is_offloaded(model, name):
        raise ValueError(
            f"{name} is offloaded without a device_map, so that save_pretrained would not find its values: load it "
            "with device_map, or use dispatch_model of accelerate, which sets one."
        )


def find_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its inputs.

    Args:
        model: A model with parameters.

    Returns:
        That on which accelerate runs it, or that of its first parameter.
    """
    for hook in _hooks_of(model):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(model.parameters()).device


def share_tensors(model: nn.Module) -> dict[int, Any]:
    """Let a copy of a model share its weights.

    `model_slim` gives new tensors to what it changes, so that a copy takes no more memory than what becomes smaller.

    Args:
        model: The model.

    Returns:
        What `copy.deepcopy` is to be given as `memo`.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            memo[id(parameter)].__dict__.update(parameter.__dict__)
    for weights in _find_weights(model):
        kept = weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights
        memo.update({id(tensor): tensor for tensor in kept.values()} if isinstance(kept, dict) else {})
    return memo


@contextmanager
def writing_apart(model: nn.Module) -> Iterator[None]:
    """Write what is changed on disk of a copy into a folder of its own, which is removed afterwards.

    Args:
        model: The copy; it cannot be used afterwards, if anything was written.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for weights in _find_weights(model):
            if getattr(weights, "save_folder", None) is not None:
                apart = tempfile.TemporaryDirectory(prefix=".hf_slim-", dir=weights.save_folder)
                setattr(weights, _FOLDER, stack.enter_context(apart))
        yield


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = module.__dict__.get("_hf_hook")
    return list(hook.hooks) if isinstance(hook, SequentialHook) else [] if hook is None else [hook]


def _find_kept(model: nn.Module, name: str) -> _Kept | None:
    """What keeps the values of a tensor: the hook of its module or of one around it."""
    parts = name.split(".")
    around: list[Any] = [model]
    for child in parts[:-1]:
        around.append(around[-1]._modules[child])
    for depth in reversed(range(len(around))):
        for hook in _hooks_of(around[depth]):
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                found = _look_up(hook.weights_map, ".".join(parts[depth:]))
                if found is not None:
                    return found
    return None


def _require_kept(model: nn.Module, name: str) -> _Kept:
    kept = _find_kept(model, name)
    if kept is None:
        raise ValueError(f"{name} is on the meta device, where tensors have no values: load the model whole.")
    return kept


def _look_up(weights: Any, key: str) -> _Kept | None:
    """Follow the prefixes; without `in`, which would read the tensor."""
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    known = weights
    if isinstance(weights, OffloadedWeightsLoader):
        known = weights.state_dict if key in weights.state_dict else weights.index
    return _Kept(weights, key) if known is not None and key in known else None


def _find_weights(model: nn.Module) -> list[Any]:
    """What keeps weights of a model, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for hook in _hooks_of(module):
            weights = getattr(hook, "weights_map", None)
            while isinstance(weights, PrefixedDataset):
                weights = weights.dataset
            if weights is not None:
                found[id(weights)] = weights
    return list(found.values())


def _refuse_unchangeable(model: nn.Module, name: str, kept: _Kept) -> None:
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    if name in tied or name in tied.values():
        raise ValueError(
            f"{name} is offloaded and tied to another weight, so that it cannot get a size of its own there: load the "
            "model whole, or give its module a device in device_map."
        )
    if not isinstance(kept.weights, OffloadedWeightsLoader):
        if not isinstance(kept.weights, MutableMapping):
            raise ValueError(
                f"{name} is kept by a {type(kept.weights).__name__}, where it cannot be changed: load the model whole."
            )
    elif kept.key not in kept.weights.state_dict and _folder_of(kept.weights) is None:
        raise ValueError(
            f"{name} is offloaded to the files that the model was loaded from, which are not to be changed: pass "
            "offload_folder to from_pretrained, where its new values can be written."
        )


def _folder_of(weights: OffloadedWeightsLoader) -> Any:
    return getattr(weights, _FOLDER, weights.save_folder)


def _write(folder: str, key: str, tensor: torch.Tensor) -> dict[str, str]:
    """Write a tensor to a file that takes its place when it is whole, and say where it is.

    The file may be one that the old values are still mapped from, so it is not written over.
    """
    path = os.path.join(folder, f"{key}.safetensors")
    save_file({key: tensor}, f"{path}.part")
    os.replace(f"{path}.part", path)
    return {"safetensors_file": path, "weight_name": key, "dtype": str(tensor.dtype).removeprefix("torch.")}
