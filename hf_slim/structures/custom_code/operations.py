"""The operations of torch that treat units by themselves, and under which conditions they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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

Named = Mapping[str, Any]


def apply_operation(name: str, values: Sequence[Any], named: Named, heads: set[int]) -> Any:
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
    first = values[0] if values else named.get("input", named.get("query", Plain()))
    if name in _ARITHMETIC:
        return combine(values)
    if name in ELEMENTWISE:
        return align([*values, *named.values()])
    if name == "einsum":
        return _einsum(values)
    given = _Given(name, values[1:], named, heads)
    if name in _OF_ANY:
        return _OF_ANY[name](first, given)
    if not isinstance(first, Units):
        if name in ("expand", "view", "reshape") and isinstance(first, Plain):
            return _spread(given.all())
        raise UnreadableError(f"calls {name} in a way that is not known")
    if name in _OF_UNITS:
        return _OF_UNITS[name](first, given)
    if name in _ALONG or name in _REDUCING:
        return _go_along(first, given)
    raise UnreadableError(f"calls {name}, of which it is not known that it treats units by themselves")


class _Given(NamedTuple):
    """The name of an operation, what it is given beside its first operand, and the widths that a unit may have."""

    name: str
    values: Sequence[Any]
    named: Named
    heads: set[int]

    def get(self, place: int, *names: str, default: Any = None) -> Any:
        """What is given at a place or by one of some names."""
        by_name = [self.named[name] for name in names if name in self.named]
        return by_name[0] if by_name else self.values[place] if len(self.values) > place else default

    def dim(self, place: int, name: str = "dim", default: int = 0) -> int:
        """The dimension that is given."""
        return _number(self.get(place, name, default=Plain(default)))

    def all(self) -> list[Any]:
        """All that is given, in one tuple or by itself."""
        return _flat([*self.values, *self.named.values()])

    def numbers(self) -> list[int]:
        """All that is given, as dimensions."""
        return [_number(value) for value in self.all()]


def _flat(values: Sequence[Any]) -> list[Any]:
    return list(values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values)


def _number(value: Any) -> int:
    if isinstance(value, Plain) and type(value.value) is int:
        return value.value
    raise UnreadableError("goes along a dimension that is not written in the code")


def _go_along(first: Units, given: _Given) -> Units:
    """Softmax, sums and the like, along dimensions along which no units lie."""
    place = {"norm": 1, "roll": 1}.get(given.name, 0)
    dims = given.get(place, "dim", "dims", "axis")
    if dims is None:
        raise UnreadableError(f"calls {given.name} over all units together")
    keep = given.get(place + 1, "keepdim", default=Plain(False))
    return reduce(first, [_number(dim) for dim in _flat([dims])], keep=given.name in _ALONG or keep == Plain(True))


def _attend(query: Any, given: _Given) -> Any:
    operands = (query, given.get(0, "key"), given.get(1, "value"))
    units = [part for part in operands if isinstance(part, Units)]
    if any(part.axis > -3 for part in units):
        raise UnreadableError("attends along the dimension of the heads")
    others = [other for name, other in given.named.items() if name not in ("query", "key", "value")]
    return align([*units, *given.values[2:], *others])


def _cat(first: Any, given: _Given) -> Any:
    found = _align_parts(first, given)
    if found.at(given.dim(0)) == found.axis:
        raise UnreadableError("joins tensors along the dimension of the units")
    return found


def _align_parts(first: Any, given: _Given) -> Any:
    parts = [first.value] if isinstance(first, Many) else first
    if not isinstance(parts, (tuple, list)):
        raise UnreadableError(f"calls {given.name} in a way that is not known")
    return align(parts)


def _einsum(values: Sequence[Any]) -> Any:
    equation = getattr(values[0], "value", None)
    operands = values[1] if len(values) == 2 and isinstance(values[1], tuple) else values[1:]
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise UnreadableError("calls einsum in a way that is not known")
    left, _, output = equation.replace(" ", "").partition("->")
    terms = list(zip(left.split(","), operands, strict=True))
    letters = {term[operand.axis] for term, operand in terms if isinstance(operand, Units)}
    plain = [term for term, operand in terms if not isinstance(operand, Units)]
    if len(letters) != 1 or not letters <= set(output) or any(letters & set(term) for term in plain):
        raise UnreadableError("mixes units by einsum")
    return Units(output.index(letters.pop()) - len(output), len(output))


def _spread(sizes: list[Any]) -> Any:
    places = [place - len(sizes) for place, size in enumerate(sizes) if isinstance(size, Size)]
    if len(places) > 1:
        raise UnreadableError("makes a tensor with several sizes that depend on how many units there are")
    return Units(places[0], len(sizes)) if places else Plain()


def _chunk(first: Units, given: _Given) -> Any:
    asked = given.get(0, "chunks", "split_size_or_sections", default=Plain())
    if first.at(given.dim(1)) != first.axis:
        return tuple(first for _ in asked) if isinstance(asked, tuple) else Many(first)
    count = len(asked) if isinstance(asked, tuple) else getattr(asked, "value", None)
    if first.parts > 1 and (count == first.parts or isinstance(asked, Size)):
        return (replace(first, parts=1),) * first.parts
    raise UnreadableError("splits the units")


def _unflatten(first: Units, given: _Given) -> Units:
    if given.dim(0) != -1:
        raise UnreadableError("splits a dimension in a way that is not known")
    return reshape(first, [Plain(), Plain(), *given.get(1, "sizes", default=())], given.heads)


def _expand(first: Units, given: _Given) -> Units:
    sizes = given.all()
    return replace(first, rank=len(sizes) if all(isinstance(size, (Plain, Size)) for size in sizes) else None)


def _repeat(first: Units, given: _Given) -> Units:
    """Only each head in turn; `repeat` repeats all of them in turn."""
    dim = given.get(1, "dim")
    if dim is None:
        raise UnreadableError("repeats the units")
    first.at(_number(dim))
    return first


def _layer_norm(first: Units, given: _Given) -> Units:
    shape = given.get(0, "normalized_shape")
    if not isinstance(shape, tuple) or len(shape) != 1 or first.axis == -1:
        raise UnreadableError("normalizes units together")
    return first


def _triangle(first: Units, given: _Given) -> Units:
    if first.axis > -3:
        raise UnreadableError("takes a triangle of units")
    return first


def _size_of(first: Units, given: _Given) -> Any:
    return shape_of(first, _number(given.values[0]) if given.values else None)


def shape_of(value: Units, dim: int | None = None) -> Any:
    """The sizes of a tensor, or one of them."""
    if dim is not None:
        return Size(UNKNOWN) if value.at(dim) == value.axis else Plain()
    if value.rank is None:
        raise UnreadableError("reads the shape of a tensor of which the rank is not known")
    return tuple(Size() if place == value.axis else Plain() for place in range(-value.rank, 0))


Operation = Callable[[Any, _Given], Any]

_OF_ANY: dict[str, Operation] = {
    "glu": lambda first, given: glu(first),
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), lambda first, given: multiply(first, given.get(0, "other"))),
    "scaled_dot_product_attention": _attend,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "stack": lambda first, given: insert(_align_parts(first, given), given.dim(0)),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like"), lambda first, given: first),
}
_OF_UNITS: dict[str, Operation] = {
    **dict.fromkeys(("view", "reshape"), lambda first, given: reshape(first, given.all(), given.heads)),
    "flatten": lambda first, given: flatten(first, given.dim(0, "start_dim"), given.dim(1, "end_dim", -1)),
    "unflatten": _unflatten,
    **dict.fromkeys(("transpose", "swapaxes"), lambda first, given: swap(first, *given.numbers())),
    "permute": lambda first, given: permute(first, given.numbers()),
    "unsqueeze": lambda first, given: insert(first, *given.numbers()),
    "squeeze": lambda first, given: reduce(first, given.numbers(), keep=False),
    "expand": _expand,
    "expand_as": lambda first, given: align([first, *given.values]),
    "repeat_interleave": _repeat,
    **dict.fromkeys(("chunk", "split", "tensor_split"), _chunk),
    "unbind": lambda first, given: Many(reduce(first, [given.dim(0)], keep=False)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "normalize": lambda first, given: reduce(first, [given.dim(1, default=1)], keep=True),
    **dict.fromkeys(("max", "min"), lambda first, given: (_go_along(first, given),) * 2),
    **dict.fromkeys(("tril", "triu"), _triangle),
    "size": _size_of,
    **dict.fromkeys(("dim", "is_floating_point"), lambda first, given: Plain()),
    "numel": lambda first, given: Size(),
    **dict.fromkeys(("new_zeros", "new_ones"), lambda first, given: _spread(_flat(given.values))),
}
