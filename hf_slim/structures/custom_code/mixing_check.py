"""Code that no sweep has proven: classes that are not of transformers, hooks, and activations of any origin."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...modeling_hf_slim import written_class
from ..linear_layers import find_child, join
from ..structure import Structure
from .activation_functions import InconclusiveError, find_mixed
from .axes import UnreadableError
from .dataflow import read_flow
from .numeric_trial import probe_module, relative

_KNOWN = frozenset(("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "hf_slim"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def find_hook(model: nn.Module, path: str, structure: Structure) -> str | None:
    """Find a hook of somebody's own on a module whose code a structure's values go through.

    Args:
        model: The model.
        path: Dotted name of the module that matched a layout.
        structure: What was read from it.

    Returns:
        The reason to leave the structure alone, None if there is none.
    """
    parts = _find_parts(model, path, structure)[1]
    hooks = (_find_hook(join(path, name), part) for name, part in parts.items() if name)
    return next((reason for reason in hooks if reason is not None), None)


def find_strange(model: nn.Module, path: str, structure: Structure) -> str | None:
    """Find out whether code of somebody's own makes the units of a structure depend on one another.

    The layouts say what a module looks like. What the classes of transformers compute is proven for all of them by the
    sweep; what other code computes is tried on a small copy, and read where it cannot be tried.

    Args:
        model: The model.
        path: Dotted name of the module that matched a layout.
        structure: What was read from it.

    Returns:
        The reason to leave the structure alone, None if there is none.
    """
    module, parts = _find_parts(model, path, structure)
    mixed = next(_find_mixed_activations(parts), None) if structure.kind == "ffn" else None
    if mixed is None and all(_is_known(part) for part in parts.values()):
        return None
    path, module = _running(model, path, module)
    try:
        return probe_module(module, relative(structure, path))
    except InconclusiveError as reason:
        try:
            read_flow(module, relative(structure, path))
        except UnreadableError as unread:
            return mixed or f"{reason}, and {unread}"
        return None


def _find_parts(model: nn.Module, path: str, structure: Structure) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The module that matched a layout, and the parts whose code a structure's values go through."""
    module = find_child(model, path)
    assert module is not None
    return module, dict(_parts(module, relative(structure, path)))


def _parts(module: nn.Module, structure: Structure) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose code a structure's values go through: those around its layers, and those without weights."""
    around = {""}
    for member in structure.members:
        names = member.tensor.split(".")[:-1]
        around.update(".".join(names[:end]) for end in range(1, len(names) + 1))
    for name, part in module.named_modules():
        if name in around or not any(True for _ in part.parameters()):
            yield name, part


def _is_known(module: nn.Module) -> bool:
    replaced = module.__dict__.get("forward")
    kind: Any = type(module)
    return _is_known_class(kind) and (replaced is None or _is_known_code(replaced))


@functools.cache
def _is_known_class(kind: Any) -> bool:
    """Whether what a class computes is written in transformers or in a library beneath it."""
    for base in written_class(kind).__mro__:
        known = base.__module__.partition(".")[0] in _KNOWN
        methods = [name for name, value in vars(base).items() if inspect.isfunction(value) and name != "__init__"]
        if not known and methods:
            return False
        if known and "forward" in vars(base):
            return base is not nn.Module or kind.__module__.partition(".")[0] in _KNOWN
    return True


def _is_known_code(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    origin = getattr(function, "__module__", None) or type(function).__module__
    return origin.partition(".")[0] in _KNOWN


def _find_hook(path: str, module: nn.Module) -> str | None:
    for kind in _HOOKS:
        for hook in module.__dict__[kind].values():
            if not _is_known_code(hook):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                return f"a hook on {path} ({name}) may change what goes through it: remove the hook first"
    return None


def _find_mixed_activations(parts: dict[str, nn.Module]) -> Iterator[str]:
    """What is called an activation and is no function of each element."""
    for name, module in parts.items():
        called = {name: module} if "act" in name.rpartition(".")[2].lower() else {}
        for key, value in module.__dict__.items():
            if "act" in key.lower() and callable(value) and not isinstance(value, type):
                called[join(name, key)] = value
        for path, function in called.items():
            with contextlib.suppress(InconclusiveError):
                mixed = find_mixed(function)
                if mixed is not None:
                    yield f"its activation {path} is no function of each element: it {mixed}"


def _running(model: nn.Module, path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module itself, or the nearest around it that has a `forward`."""
    while path and type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        path = path.rpartition(".")[0]
        found = find_child(model, path)
        assert found is not None
        module = found
    return path, module
