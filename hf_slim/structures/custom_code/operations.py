"""The operations of torch that treat units by themselves, and under which conditions they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .axes import (
    UNKNOWN,
    Many,
    Plain,
    Size,
    Units,
    UnreadableError,
    align,
    combine,
    flatten,
    glu,
    insert,
    multiply,
    permute,
    reduce,
    reshape,
    swap,
)

ELEMENTWISE = frozenset(
    "abs add sub mul div true_divide rsub neg pow square sqrt rsqrt exp expm1 log log1p sin cos tanh sigmoid relu "
    "relu6 gelu silu mish elu selu celu leaky_relu softplus softsign logsigmoid hardswish hardsigmoid hardtanh "
    "erf clamp clip minimum maximum where masked_fill dropout alpha_dropout to type type_as float half bfloat16 "
    "double contiguous clone detach nan_to_num requires_grad_ reciprocal sign round isnan isinf ge gt le lt eq ne "
    "logical_and logical_or logical_not bool add_ sub_ mul_ div_ masked_fill_ clamp_ relu_ tanh_ sigmoid_ exp_ "
    "copy_ zero_ lerp addcmul addcdiv".split()
)
_ARITHMETIC = frozenset(
    "add sub mul div true_divide add_ sub_ mul_ div_ where masked_fill minimum maximum lerp".split()
)
_ALONG = frozenset("softmax log_softmax cumsum cumprod flip roll sort logcumsumexp softmin narrow".split())
_REDUCING = frozenset("sum mean amax amin std var logsumexp prod norm all any argmax argmin".split())

Arguments = Sequence[Any]
Named = Mapping[str, Any]


def apply_operation(name: str, values: Arguments, named: Named, heads: set[int]) -> Any:
    """What an operation makes of its operands, some of which hold units.

    Args:
        name: Name of the function or of the method.
        values: What it is given; of a method the tensor itself first.
        named: What it is given by name.
        heads: The widths that a unit may have.

    Returns:
        What it gives.

    Raises:
        UnreadableError: If it may mix units, or it is not known.
    """
    first = values[0] if values else named.get("input", Plain())
    if name in _ARITHMETIC:
        return combine(values)
    if name in ELEMENTWISE:
        return align([*values, *named.values()])
    if name == "glu":
        return glu(first)
    if name in ("matmul", "bmm", "__matmul__"):
        return multiply(values[0], values[1] if len(values) > 1 else named["other"])
    if name == "scaled_dot_product_attention":
        return _attend(values, named)
    if name in ("cat", "concat", "concatenate", "stack"):
        return _join(name, first, values, named)
    if name == "einsum":
        return _einsum(values)
    if name in ("zeros_like", "ones_like", "empty_like", "full_like"):
        return first
    if not isinstance(first, Units):
        if name in ("expand", "view", "reshape") and isinstance(first, Plain):
            return _spread(_sizes(values[1:], named))
        raise UnreadableError(f"calls {name} in a way that is not known")
    handler = _HANDLERS.get(name)
    if handler is not None:
        return handler(first, list(values[1:]), named, heads)
    if name in _ALONG or name in _REDUCING:
        return _go_along(name, first, list(values[1:]), named)
    raise UnreadableError(f"calls {name}, of which it is not known that it treats units by themselves")


def _number(value: Any) -> int:
    if isinstance(value, Plain) and type(value.value) is int:
        return value.value
    raise UnreadableError("goes along a dimension that is not written in the code")


def _numbers(values: Arguments) -> list[int]:
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = values[0]
    return [_number(value) for value in values]


def _sizes(values: Arguments, named: Named) -> list[Any]:
    values = [*values, *named.values()]
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = list(values[0])
    return list(values)


def _go_along(name: str, first: Units, rest: list[Any], named: Named) -> Any:
    """Softmax, sums and the like, along dimensions along which no units lie."""
    named = dict(named)
    position = {"norm": 1, "roll": 1}.get(name, 0)
    dims = named.get("dim", named.get("dims", named.get("axis", rest[position] if len(rest) > position else None)))
    if dims is None:
        raise UnreadableError(f"calls {name} over all units together")
    places = _numbers([dims])
    keep = named.get("keepdim", rest[position + 1] if len(rest) > position + 1 else Plain(False))
    if name in _ALONG:
        return reduce(first, places, keep=True)
    return reduce(first, places, keep=isinstance(keep, Plain) and keep.value is True)


def _attend(values: Arguments, named: Named) -> Any:
    query, key, value = (
        values[place] if len(values) > place else named[name] for place, name in enumerate(("query", "key", "value"))
    )
    units = [part for part in (query, key, value) if isinstance(part, Units)]
    if any(part.axis > -3 for part in units):
        raise UnreadableError("attends along the dimension of the heads")
    others = [other for name, other in named.items() if name not in ("query", "key", "value")]
    return align([*units, *values[3:], *others])


def _join(name: str, first: Any, values: Arguments, named: Named) -> Any:
    parts = [first.value] if isinstance(first, Many) else first
    if not isinstance(parts, (tuple, list)):
        raise UnreadableError(f"calls {name} in a way that is not known")
    found = align(parts)
    dim = _number(named.get("dim", values[1] if len(values) > 1 else Plain(0)))
    if name == "stack":
        return insert(found, dim)
    if found.at(dim) == found.axis:
        raise UnreadableError("joins tensors along the dimension of the units")
    return found


def _einsum(values: Arguments) -> Any:
    equation = getattr(values[0], "value", None)
    operands = values[1] if len(values) == 2 and isinstance(values[1], tuple) else values[1:]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise UnreadableError("calls einsum in a way that is not known")
    left, _, output = equation.replace(" ", "").partition("->")
    letters = {
        term[operand.axis]
        for term, operand in zip(left.split(","), operands, strict=True)
        if isinstance(operand, Units)
    }
    terms = left.split(",")
    plain = [term for term, operand in zip(terms, operands, strict=True) if not isinstance(operand, Units)]
    if len(letters) != 1 or not letters <= set(output) or any(letters & set(term) for term in plain):
        raise UnreadableError("mixes units by einsum")
    return Units(output.index(letters.pop()) - len(output), len(output))


def _spread(sizes: list[Any]) -> Any:
    places = [place - len(sizes) for place, size in enumerate(sizes) if isinstance(size, Size)]
    if not places:
        return Plain()
    if len(places) > 1:
        raise UnreadableError("makes a tensor with several sizes that depend on how many units there are")
    return Units(places[0], len(sizes))


def _chunk(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    dim = _number(named.get("dim", rest[1] if len(rest) > 1 else Plain(0)))
    asked = rest[0] if rest else named.get("chunks", named.get("split_size_or_sections", Plain()))
    if first.at(dim) != first.axis:
        return tuple(first for _ in asked) if isinstance(asked, tuple) else Many(first)
    count = len(asked) if isinstance(asked, tuple) else getattr(asked, "value", None)
    if first.parts > 1 and (count == first.parts or isinstance(asked, Size)):
        return (replace(first, parts=1),) * first.parts
    raise UnreadableError("splits the units")


def _unflatten(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    sizes = named.get("sizes", rest[1] if len(rest) > 1 else ())
    if _number(named.get("dim", rest[0] if rest else Plain())) != -1:
        raise UnreadableError("splits a dimension in a way that is not known")
    return reshape(first, [Plain(), Plain(), *sizes], heads)


def _permute(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    return permute(first, _numbers(rest or list(named.values())))


def _unbind(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    return Many(reduce(first, [_number(named.get("dim", rest[0] if rest else Plain(0)))], keep=False))


def _expand(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    sizes = _sizes(rest, named)
    rank = None if any(not isinstance(size, (Plain, Size)) for size in sizes) else len(sizes)
    return replace(first, rank=rank)


def _repeat(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    """Only each head in turn; `repeat` repeats all of them in turn."""
    dim = named.get("dim", rest[1] if len(rest) > 1 else None)
    if dim is None:
        raise UnreadableError("repeats the units")
    first.at(_number(dim))
    return first


def _layer_norm(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    shape = named.get("normalized_shape", rest[0] if rest else None)
    if not isinstance(shape, tuple) or len(shape) != 1 or first.axis == -1:
        raise UnreadableError("normalizes units together")
    return first


def _normalize(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    return reduce(first, [_number(named.get("dim", rest[1] if len(rest) > 1 else Plain(1)))], keep=True)


def _extremes(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    found = _go_along("amax", first, rest, named)
    return (found, found)


def _triangle(first: Units, rest: list[Any], named: Named, heads: set[int]) -> Any:
    if first.axis > -3:
        raise UnreadableError("takes a triangle of units")
    return first


_HANDLERS: dict[str, Callable[[Units, list[Any], Named, set[int]], Any]] = {
    "view": lambda first, rest, named, heads: reshape(first, _sizes(rest, named), heads),
    "reshape": lambda first, rest, named, heads: reshape(first, _sizes(rest, named), heads),
    "flatten": lambda first, rest, named, heads: flatten(
        first, *_numbers([*rest, *(named[name] for name in ("start_dim", "end_dim") if name in named)])
    ),
    "unflatten": _unflatten,
    "transpose": lambda first, rest, named, heads: swap(first, *_numbers(rest)),
    "swapaxes": lambda first, rest, named, heads: swap(first, *_numbers(rest)),
    "permute": _permute,
    "unsqueeze": lambda first, rest, named, heads: insert(first, *_numbers([*rest, *named.values()])),
    "squeeze": lambda first, rest, named, heads: reduce(first, _numbers([*rest, *named.values()]), keep=False),
    "expand": _expand,
    "expand_as": lambda first, rest, named, heads: align([first, *rest]),
    "repeat_interleave": _repeat,
    "chunk": _chunk,
    "split": _chunk,
    "tensor_split": _chunk,
    "unbind": _unbind,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "normalize": _normalize,
    "max": _extremes,
    "min": _extremes,
    "tril": _triangle,
    "triu": _triangle,
    "size": lambda first, rest, named, heads: shape_of(first, _number(rest[0]) if rest else None),
    "dim": lambda first, rest, named, heads: Plain(),
    "numel": lambda first, rest, named, heads: Size(),
    "new_zeros": lambda first, rest, named, heads: _spread(_sizes(rest, {})),
    "new_ones": lambda first, rest, named, heads: _spread(_sizes(rest, {})),
    "is_floating_point": lambda first, rest, named, heads: Plain(),
}


def shape_of(value: Units, dim: int | None = None) -> Any:
    """The sizes of a tensor, or one of them."""
    if dim is not None:
        return Size(UNKNOWN) if value.at(dim) == value.axis else Plain()
    if value.rank is None:
        raise UnreadableError("reads the shape of a tensor of which the rank is not known")
    return tuple(Size() if place == value.axis else Plain() for place in range(-value.rank, 0))
