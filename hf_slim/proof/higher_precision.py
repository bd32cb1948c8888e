"""Running a model at a higher precision than its weights have, without touching the weights."""

from __future__ import annotations

import functools
import types as types_of
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedConfig

_NARROWER = {
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float16, torch.bfloat16, torch.float32),
}
_PLAIN = (torch.Tensor, nn.Parameter)
_IMPLEMENTATION = "_attn_implementation_internal"


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let everything that a model computes be computed in a wider type.

    Every operation gets its floating-point tensors in that type: a weight is widened for the one operation that reads
    it, so that no more than a weight is there twice, wherever it is kept. The parameters themselves are not touched.
    What the code of a model casts to a narrower type in between stays wide, too; quantized weights stay as they are.
    Kernels for attention that know only half precision are not used meanwhile.

    Args:
        model: The model; it is as before afterwards.
        dtype: `torch.float32` or `torch.float64`.

    Yields:
        Nothing.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    configs = {id(value): vars(value) for value in values if isinstance(value, PreTrainedConfig)}
    before = [(fields, fields.get(_IMPLEMENTATION)) for fields in configs.values()]
    flash = [(fields, name) for fields, name in before if "flash" in str(name)]
    try:
        for fields, _ in flash:
            fields[_IMPLEMENTATION] = "sdpa"
        with _Widening(dtype), _Matching(dtype):
            yield
    finally:
        for fields, name in flash:
            fields[_IMPLEMENTATION] = name


def is_narrow(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a model computes something in a narrower type than asked for.

    Args:
        model: The model.
        inputs: The keyword arguments of its forward pass.
        dtype: `torch.float32` or `torch.float64`.

    Returns:
        True if a weight, a buffer or an input is of a narrower type, or accelerate runs the model in one. Always for
        float64, since the code of many norms and softmaxes casts to float32.
    """
    if dtype == torch.float64:
        return True
    tensors = (*model.parameters(), *model.buffers(), *inputs.values())
    narrow = any(isinstance(tensor, torch.Tensor) and tensor.dtype in _NARROWER[dtype] for tensor in tensors)
    return narrow or any("_original_forward" in module.__dict__ for module in model.modules())


class _Writes(NamedTuple):
    """What an operation does to its arguments: it only looks at them from another side, or writes to some."""

    views: bool
    names: frozenset[str]
    places: tuple[int, ...]


@functools.cache
def _find_writes(schema_owner: Any) -> _Writes:
    schema = schema_owner._schema
    written = {
        argument.name: place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    views = not written and any(returned.alias_info is not None for returned in schema.returns)
    return _Writes(views, frozenset(written), tuple(written.values()))


class _Widening(TorchDispatchMode):
    """Casts what operations are given, make and are asked to make."""

    supports_higher_order_operators = True

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._narrower = _NARROWER[dtype]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):
            return func(*tree_map(self._widen, args), **tree_map(self._widen, kwargs))
        writes = _find_writes(func)
        if writes.views:
            return func(*args, **kwargs)
        written = [args[place] for place in writes.places if place < len(args)]
        written += [kwargs[name] for name in writes.names if name in kwargs]
        narrow = [tensor.dtype for tensor in written if self._is_narrow(tensor)]
        if narrow:  # what is written to cannot be another tensor, so it gets values of its own type

            def cast(value: Any) -> Any:
                is_wide = isinstance(value, torch.Tensor) and value.dtype == self._dtype
                return value.to(narrow[0]) if is_wide else value

            return func(*tree_map(cast, args), **tree_map(cast, kwargs))
        wide_args, wide_kwargs = tree_map(self._widen, args), tree_map(self._widen, kwargs)
        if func is torch.ops.aten._grouped_mm.default and [value.dim() for value in args[:2]] == [2, 3]:
            ends = wide_kwargs["offs"] if "offs" in kwargs else wide_args[2]
            return _multiply_groups(wide_args[0], wide_args[1], ends)
        result = func(*wide_args, **wide_kwargs)
        return result if written else tree_map(self._widen, result)

    def _is_narrow(self, value: Any) -> bool:
        return type(value) in _PLAIN and value.dtype in self._narrower

    def _widen(self, value: Any) -> Any:
        if self._is_narrow(value):
            return value.to(self._dtype)
        return self._dtype if isinstance(value, torch.dtype) and value in self._narrower else value


class _Matching(TorchFunctionMode):
    """Casts weights to the type of what they meet, for functions that compare types before they run any operation."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.full) and any(isinstance(value, float) for value in args):
            return func(*args, **{"dtype": self._dtype, **kwargs})  # the least number of a type fits no narrower one
        if isinstance(func, (types_of.BuiltinFunctionType, types_of.FunctionType)) and "out" not in kwargs:
            values = tree_leaves((args, kwargs))
            if any(isinstance(value, torch.Tensor) and value.dtype == self._dtype for value in values):
                args, kwargs = tree_map(self._cast, args), tree_map(self._cast, kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        is_narrow = isinstance(value, nn.Parameter) and type(value) in _PLAIN and value.dtype in _NARROWER[self._dtype]
        return value.to(self._dtype) if is_narrow else value


def _multiply_groups(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The grouped matrix product, whose kernels do not take every type.

    Args:
        rows: Shape `[rows, inputs]`, those of one group after those of the other.
        weights: Shape `[groups, inputs, outputs]`.
        ends: Where the rows of each group end.

    Returns:
        Shape `[rows, outputs]`; rows behind the last group give zeros.
    """
    result = rows.new_zeros((len(rows), weights.shape[-1]))
    begin = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        result[begin:end] = rows[begin:end] @ weight
        begin = end
    return result
