"""What a module's code makes of its units, read off its source: each operation has to treat them by themselves."""

from __future__ import annotations

import inspect
import types
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from ..linear_layers import find_child, find_layer, join
from ..projection_names import HEAD_SIZES
from ..source_code import parse_function
from ..structure import Member, Structure, get_tensor
from ..unit_counts import get_field
from .activation_functions import is_elementwise
from .axes import NARROW, UNKNOWN, Many, Plain, Size, Units, UnreadableError, glu
from .functions import Scope
from .operations import apply_operation, shape_of
from .values import Bound, Child, Conflict, Known, is_tainted, wrap

_DEPTH = 12


def read_flow(module: nn.Module, structure: Structure) -> None:
    """Read the code of a module from the layers that make units to the layer that reads them.

    Takes hidden states for tensors of three dimensions.

    Args:
        module: The module.
        structure: A structure in it, its names relative to the module.

    Raises:
        UnreadableError: If it cannot be told of something in the code that units stay by themselves; names it.
    """
    flow = _Flow(module, structure)
    try:
        result = flow.call_module("", [Plain()], {})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UnreadableError(f"the code of {type(module).__name__} is written in a way that is not known") from error
    for part in result if isinstance(result, tuple) else (result,):
        if isinstance(part, (Units, Size, Conflict)):
            raise UnreadableError(f"the code of {type(module).__name__} gives more than its last layer makes")
        break
    missing = flow.layers - flow.called
    if missing:
        raise UnreadableError(f"the code of {type(module).__name__} does not call {', '.join(sorted(missing))}")


class _Flow:
    def __init__(self, module: nn.Module, structure: Structure) -> None:
        self.module, self.structure = module, structure
        self.members: dict[str, list[Member]] = {}
        for member in structure.members:
            self.members.setdefault(member.tensor, []).append(member)
        self.layers = {m.tensor.rpartition(".")[0] for m in structure.members if m.role in ("input", "output")}
        self.called: set[str] = set()
        self.counts = {(count.module, count.attribute) for count in structure.counts}
        self.widths: set[int] = set()
        if structure.kind == "mha":
            stated = (part.__dict__.get(name) for part in module.modules() for name in HEAD_SIZES)
            self.widths = {size for size in stated if type(size) is int}
            self.widths |= {m.index.shape[1] for m in structure.members if m.role in ("input", "output")}
        self.depth = 0

    # Calls.

    def call_module(self, path: str, values: list[Any], named: dict[str, Any]) -> Any:
        part = find_child(self.module, path)
        assert part is not None
        inside = [name for name in self.members if not path or name.startswith(f"{path}.")]
        tainted = is_tainted([*values, *named.values()])
        if inside and find_layer(self.module, path) is not None:
            return self._call_layer(path, values)
        if not inside and not tainted:
            return Plain()
        if not inside and values and isinstance(values[0], Units):
            if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
                return apply_operation("layer_norm", [values[0], (Plain(),)], {}, self.widths)
            if isinstance(part, (nn.Softmax, nn.LogSoftmax)):
                return apply_operation("softmax", [values[0]], {"dim": Plain(part.dim)}, self.widths)
            if type(part).__module__.startswith("torch.") and not any(True for _ in part.parameters()):
                if isinstance(part, nn.GLU) and part.dim == -1:
                    return glu(values[0])
                if len(values) == 1 and is_elementwise(part):
                    return values[0]
                raise UnreadableError(f"{type(part).__name__} at {path} is no function of each element")
        if any(m.role == "norm" or m.role == "extra" for name in inside for m in self.members[name]) and values:
            if isinstance(values[0], Units) and values[0].axis == -1 and len(values) == 1:
                return values[0]  # an RMS norm or a depthwise convolution that the layout explains
        replaced = part.__dict__.get("forward", type(part).forward)
        if replaced is nn.Module.forward or not isinstance(replaced, types.FunctionType) or "forward" in part.__dict__:
            raise UnreadableError(f"the code of {path or type(part).__name__} cannot be read")
        return self._call_function(replaced, [Child(path), *values], named)

    def _call_layer(self, path: str, values: list[Any]) -> Any:
        self.called.add(path)
        part = find_child(self.module, path)
        own = [m for name, found in self.members.items() if name.startswith(f"{path}.") for m in found]
        layer = find_layer(self.module, path)
        assert part is not None and layer is not None
        if type(part).forward is not nn.Linear.forward and not type(part).__module__.startswith(
            ("torch.", "transformers.", "peft.")
        ):
            raise UnreadableError(f"{path} is a layer of its own kind, {type(part).__name__}")
        given = values[0] if values else Plain()
        if any(m.role == "output" for m in own):
            if not isinstance(given, Units) or given.axis != -1 or given.parts > 1:
                raise UnreadableError(f"{path} is not given the units in their order")
            return Plain()
        if not isinstance(given, Plain):
            raise UnreadableError(f"{path} is given what depends on units")
        weight = [m for m in own if m.tensor == layer.weight]
        return Units(-1, 3, self._parts(weight, layer.outputs))

    def _parts(self, members: list[Member], outputs: int) -> int:
        """How many parts the outputs of a layer have, each with a range of every unit."""
        first = torch.cat([member.index[0] for member in members]).sort().values
        if len(first) * self.structure.units != outputs:
            raise UnreadableError("a layer makes more than the units' values")
        breaks = int((first.diff() != 1).sum()) + 1 if self.structure.units > 1 else len(members)
        if breaks == 1:
            self.widths |= {len(first)} if self.structure.kind == "mha" else set()
        return breaks

    def call(self, function: Any, values: list[Any], named: dict[str, Any]) -> Any:
        """What a call gives."""
        if isinstance(function, Child):
            return self.call_module(function.path, values, named)
        if isinstance(function, Bound):
            return self._call_method(function, values, named)
        target = function.object if isinstance(function, Known) else None
        if isinstance(function, Plain) and not is_tainted([*values, *named.values()]):
            return Plain()
        if target is None:
            raise UnreadableError("calls what is not known")
        return self._call_known(target, values, named)

    def _call_method(self, method: Bound, values: list[Any], named: dict[str, Any]) -> Any:
        owner, name = method.owner, method.name
        if isinstance(owner, Child):
            part = find_child(self.module, owner.path)
            function = getattr(type(part), name, None)
            function = inspect.unwrap(function) if function is not None else None
            if not isinstance(function, types.FunctionType):
                raise UnreadableError(f"calls {name}, which cannot be read")
            if function.__module__.startswith("torch."):
                raise UnreadableError(f"calls {name} of torch")
            is_static = isinstance(inspect.getattr_static(type(part), name), staticmethod)
            return self._call_function(function, values if is_static else [owner, *values], named)
        if name == "update" and len(values) > 1 and isinstance(owner, Plain):
            return tuple(values[:2])  # a cache of keys and values
        if name == "append" and isinstance(owner, list):
            owner.append(values[0])
            return Plain()
        if isinstance(owner, (Units, Size)) or is_tainted([*values, *named.values()]):
            return apply_operation(name, [owner, *values], named, self.widths)
        return Plain()

    def _call_known(self, target: Any, values: list[Any], named: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", "")
        everything = [*values, *named.values()]
        children = [value for value in everything if isinstance(value, (Child, Bound)) and not _is_config(value)]
        if name == "apply_chunking_to_forward":
            return self.call(values[0], values[3:], {})
        if name == "checkpoint":
            return self.call(values[0], values[1:], {})
        if target in (isinstance, hasattr, type, callable, print):
            return Plain()
        if target is getattr:
            is_own = isinstance(values[0], Child) or _is_config(values[0])
            return self.attribute(values[0], values[1].value) if is_own else Plain()
        if target in (tuple, list) and values:
            return values[0]
        if isinstance(target, types.FunctionType) and not target.__module__.startswith("torch."):
            if is_tainted(everything) or children:
                return self._call_function(inspect.unwrap(target), values, named)
            return Plain()
        if children:
            raise UnreadableError(f"hands a module or a method to {name}")
        if not is_tainted(everything):
            numbers = [value.value for value in values if isinstance(value, Plain)]
            is_number = target in (max, min, int, float) or getattr(target, "__module__", None) == "math"
            if is_number and all(isinstance(number, (int, float)) for number in numbers) and not named:
                return Plain(target(*numbers))
            return Plain()
        if target is len or (inspect.isbuiltin(target) and target.__module__ in ("math", "builtins")):
            return Size()
        if target in (int, float, range, max, min):
            return Size()
        if _is_of_torch(target, name):
            if name in ("zeros", "ones", "full", "empty"):
                return apply_operation("expand", [Plain(), *values[:1]], {}, self.widths)
            if not any(isinstance(value, (Units, tuple, list, Many)) for value in everything):
                return Size()
            return apply_operation(name, values, named, self.widths)
        if everything == values[:1] and values[0] == replace(values[0], axis=-1) and is_elementwise(target):
            return values[0]
        raise UnreadableError(f"hands units to {name or target!r}, which cannot be read")

    def _call_function(self, function: types.FunctionType, values: list[Any], named: dict[str, Any]) -> Any:
        self.depth += 1
        if self.depth > _DEPTH:
            raise UnreadableError("its functions call one another too deeply")
        try:
            tree = parse_function(function)
        except OSError as error:
            raise UnreadableError(f"the source of {function.__qualname__} cannot be had") from error
        scope = Scope(self, function, tree, values, named)
        result = scope.run()
        self.depth -= 1
        return result

    # Attributes.

    def attribute(self, owner: Any, name: str) -> Any:
        """What an attribute of a value is."""
        if isinstance(owner, Child):
            return self._of_module(owner.path, name)
        if isinstance(owner, Known):
            return wrap(getattr(owner.object, name, None))
        if isinstance(owner, Bound) and owner.name == "config":
            return self._of_config(owner.owner.path, name)
        if isinstance(owner, Units):
            if name == "shape":
                return shape_of(owner)
            if name in ("dtype", "device", "ndim", "is_cuda", "layout", "requires_grad"):
                return Plain()
            if name in ("mT", "T"):
                return apply_operation("transpose", [owner, Plain(-1), Plain(-2)], {}, self.widths)
            return Bound(owner, name)
        if isinstance(owner, Size):
            return Plain() if name in ("dtype", "device") else owner
        if isinstance(owner, (Plain, list)):
            return Bound(owner, name)
        if isinstance(owner, tuple) and owner and all(isinstance(part, (Units, Plain)) for part in owner):
            return owner[0]  # of named results such as values and indices
        raise UnreadableError(f"reads {name} of what is not known")

    def _of_module(self, path: str, name: str) -> Any:
        part = find_child(self.module, path)
        assert part is not None
        full = join(path, name)
        if name in part._modules:
            return Child(full) if part._modules[name] is not None else Plain(None)
        if name in part._parameters or name in part._buffers:
            return self._of_tensor(full, part)
        if (path, name) in self.counts:
            return Size(part.__dict__.get(name, UNKNOWN))
        if name == "config":
            return Bound(Child(path), name)
        if name not in part.__dict__:
            found = inspect.getattr_static(type(part), name, None)
            if isinstance(found, property):
                return self._call_function(found.fget, [Child(path)], {})  # type: ignore[arg-type]
            return Bound(Child(path), name) if callable(getattr(type(part), name, None)) else wrap(found)
        value = part.__dict__[name]
        if any(m.tensor.startswith(f"{path}.") for m in self.structure.members) and find_layer(self.module, path):
            return Size()  # a size of the layer
        return self._of_value(value)

    def _of_config(self, path: str, name: str) -> Any:
        config = self.module.get_submodule(path).__dict__.get("config")
        if (path, f"config.{name}") in self.counts:
            return Size(get_field(config, name))
        value = getattr(config, name, None)
        return Plain() if callable(value) else wrap(value)

    def elements(self, owner: Child) -> list[Any]:
        """The modules in a list of them."""
        part = find_child(self.module, owner.path)
        assert part is not None
        return [Child(join(owner.path, name)) for name in part._modules]

    def _of_tensor(self, full: str, part: nn.Module) -> Any:
        members, tensor = self.members.get(full), get_tensor(self.module, full)
        if members is None:
            return Plain(NARROW if not tensor.dim() or tensor.shape[-1] == 1 else UNKNOWN)
        path = full.rpartition(".")[0]
        if find_layer(self.module, path) is not None and path in self.layers:
            return Size()  # the weight itself
        return Units(members[0].dim - tensor.dim(), tensor.dim())

    def _of_value(self, value: Any) -> Any:
        sizes = {self.structure.units} | {m.index.numel() for m in self.structure.members}
        if isinstance(value, torch.Tensor):
            return Size() if sizes & set(value.shape) else Plain()
        if isinstance(value, (list, tuple, set, frozenset)):
            return Size() if len(value) in sizes or not all(_is_simple(part) for part in value) else Plain()
        is_known = _is_simple(value) or callable(value) or isinstance(value, (types.ModuleType, PreTrainedConfig))
        if not is_known:
            return Size()  # it may hold anything
        return wrap(value)


def _is_simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _is_config(value: Any) -> bool:
    return isinstance(value, Bound) and value.name == "config"


def _is_of_torch(target: Any, name: str) -> bool:
    return any(getattr(space, name, None) is target for space in (torch, F, torch.special, torch.Tensor))
