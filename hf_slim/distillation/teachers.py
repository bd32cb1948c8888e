"""The model that another learns from: copied or loaded, checked against it, and known again."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compaction import copy_modules, find_pretrained
from ..modeling_hf_slim import RECORD_KEY
from ..parallel import is_dispatched, is_spread
from .fresh_weights import find_untrained

SELF, DENSE = "self", "dense"
_SAMPLE = 64
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_MATTER = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "problem_type", "id2label", "label2id"),
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "auto_map", RECORD_KEY),
    }
)
_INSTEAD = "Save the model, and name its folder as slim_teacher or pass it as teacher_model."


@torch.no_grad()
def copy_teacher(model: nn.Module, field: str = "slim_teacher='self'", instead: str = _INSTEAD) -> nn.Module:
    """Copy a model as it is, with weights and a config of its own.

    What else a module around the transformers models holds is shared with the copy: it may hold on to a trainer and
    its data. Methods that were put in the place of a module's `forward` are left out, since they may run the model.

    Args:
        model: The model.
        field: The setting that asks for a copy, for the message.
        instead: What to do where it cannot be copied, for the message.

    Returns:
        The copy, without gradients.

    Raises:
        ValueError: If this process has not got all weights of the model.
    """
    if is_spread(model) or any(map(is_dispatched, find_pretrained(model))):
        raise ValueError(
            f"{field}: {type(model).__name__} is spread over processes, devices or files, and cannot be copied. "
            f"{instead}"
        )
    copied = copy_modules(model, {})
    for module in copied.modules():
        module.__dict__.pop("forward", None)
    return copied.requires_grad_(False)


def convert_teacher(teacher: nn.Module, name: str, *, is_copied: bool) -> nn.Module:
    """Give a teacher another type.

    Args:
        teacher: The teacher.
        name: That of the type.
        is_copied: Whether a copy is converted, and the teacher itself stays as it is.

    Returns:
        The teacher or the copy.

    Raises:
        ValueError: If it is to be copied, and this process has not got all of its weights.
    """
    if is_copied:
        teacher = copy_teacher(teacher, f"slim_teacher_dtype={name!r}", "Load the teacher in that type (dtype=...).")
    return teacher.to(getattr(torch, name))


def load_teacher(name: str, model: nn.Module) -> nn.Module:
    """Load a teacher by the class of the model that is trained.

    Args:
        name: A folder or a Hub name.
        model: The model that is trained; of one with adapters, the model in it.

    Returns:
        The teacher, without gradients.

    Raises:
        ValueError: If there is no such model.
    """
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    # FSDP puts a class of its own before that of the model.
    own: Any = next(cls for cls in type(base).__mro__ if not any(c.__name__ == "FSDPModule" for c in cls.__mro__))
    load = getattr(own, "from_pretrained", own)
    try:
        with torch.random.fork_rng(devices=[]):
            loaded = load(name)
    except OSError as error:
        raise ValueError(
            f"slim_teacher={name!r} is no model that {own.__name__} loads, neither a folder nor on the Hub: {error}"
        ) from error
    return loaded.requires_grad_(False)


def check_teacher(teacher: Any, model: nn.Module) -> None:
    """Refuse what cannot be the teacher of a model.

    Args:
        teacher: The teacher.
        model: The model that is trained.

    Raises:
        ValueError: If it is the model itself, shares weights with it, is sharded, or has another vocabulary or
            the labels in another order.
    """
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"teacher_model must be a model, got {teacher!r}: name a folder or Hub name as slim_teacher.")
    if is_spread(teacher):
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, is sharded over processes: load it before the training "
            "arguments are built, and pass it as teacher_model."
        )
    shared = _find_shared(teacher, model)
    if shared:
        raise ValueError(
            f"The teacher has {shared} in common with the model that is trained, so that it would change with it: "
            "pass a copy (copy.deepcopy), or slim_teacher='self'."
        )
    refuse_other_size(teacher, model, "vocab_size", "another vocabulary than")
    labels = [_list_labels(find_pretrained(module)) for module in (teacher, model)]
    if labels[0] != labels[1] and sorted(labels[0]) == sorted(labels[1]):
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, has the labels of the model that is trained in another order: "
            f"{', '.join(labels[0])} and {', '.join(labels[1])} (id2label). It would teach the wrong ones: train "
            "one of the two with the order of the other."
        )


def refuse_other_size(teacher: nn.Module, model: nn.Module, field: str, what: str) -> None:
    """Refuse a teacher whose config has another number than the model's.

    Args:
        teacher: The teacher.
        model: The model that is trained.
        field: The field of the configs; one that has it not is left alone.
        what: What it means, for the message.

    Raises:
        ValueError: If the numbers differ.
    """
    found = [_read(find_pretrained(module), field) for module in (teacher, model)]
    if None not in found and found[0] != found[1]:
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, has {what} the model that is trained: {field} is {found[0]} "
            f"and {found[1]}. Take a teacher that the model was made from, or one trained with the same tokenizer "
            "and labels."
        )


def warn_untrained(teacher: nn.Module, source: nn.Module) -> None:
    """Warn of a teacher with weights that nobody has trained.

    Args:
        teacher: The teacher.
        source: What it was copied from, itself if it was not.
    """
    names = find_untrained(source)
    if names:
        warnings.warn(
            f"The teacher, a {type(teacher).__name__}, has weights that were made up when it was loaded and that "
            f"nobody has trained: {', '.join(names)}. What it says with them is noise: fine-tune it first.",
            stacklevel=2,
        )


@torch.no_grad()
def make_fingerprint(teacher: nn.Module) -> str:
    """What tells a teacher from another one.

    Args:
        teacher: The teacher.

    Returns:
        A hash of its classes, its config and its parameters: their shapes, their first values, and the sums of all
        bits of every row, which are whole numbers and so the same on every device.
    """
    digest = hashlib.sha256()
    for name, module in teacher.named_modules():
        digest.update(f"{name} {type(module).__name__}".encode())
    for part in find_pretrained(teacher):
        digest.update(json.dumps(_prune(part.config.to_dict()), sort_keys=True, default=str).encode())
    samples, sums = [], []
    for name, parameter in teacher.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            samples.append(parameter.flatten()[:_SAMPLE].float())
            sums += _sum_bits(parameter.data)
    for tensors in (samples, sums):
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            values = torch.cat([tensor for tensor in tensors if tensor.device == device])
            digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sum_bits(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The sums of the bits of every row; of tensors with an arithmetic of their own nothing."""
    if type(tensor) is not torch.Tensor or not tensor.numel() or tensor.is_complex():
        return []
    if tensor.dim() < 2:
        return [tensor.flatten().view(_WHOLE[tensor.element_size()]).long()]
    rows = tensor.flatten(1).contiguous()
    is_even = rows.shape[1] * rows.element_size() % 8 == 0  # several values at once are summed faster
    return [rows.view(torch.int64 if is_even else _WHOLE[rows.element_size()]).sum(1, dtype=torch.int64)]


def _prune(config: Any) -> Any:
    """A config without what does not change what a model computes."""
    if not isinstance(config, dict):
        return config
    kept = {str(name): value for name, value in config.items() if name not in _NO_MATTER}
    return {name: _prune(value) for name, value in kept.items() if not name.startswith("_")}


def _find_shared(teacher: nn.Module, model: nn.Module) -> str | None:
    """The name of the first parameter whose memory both use."""
    if is_spread(model):
        return None  # each process holds parts of its own
    used = {_memory_of(p) for p in model.parameters() if not p.is_meta and p.numel()}
    for name, parameter in teacher.named_parameters():
        if not parameter.is_meta and parameter.numel() and _memory_of(parameter) in used:
            return name
    return None


def _memory_of(parameter: torch.Tensor) -> tuple[torch.device, int]:
    return parameter.device, parameter.data_ptr()


def _read(models: list[PreTrainedModel], field: str) -> Any:
    return getattr(models[0].config.get_text_config(), field, None) if models else None


def _list_labels(models: list[PreTrainedModel]) -> list[str]:
    """The names of the labels in their order."""
    found = getattr(models[0].config, "id2label", None) if models else None
    return [str(name) for _, name in sorted(found.items())] if found else []
