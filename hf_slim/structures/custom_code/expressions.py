"""Reading expressions, with what the names in them mean."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import types
from typing import Any, Protocol

from .axes import UNKNOWN, Many, Plain, Size, Star, Units, Unknown, UnreadableError, align, combine, multiply, take
from .values import Bound, Child, Conflict, Known, is_tainted, merge, wrap


class Reader(Protocol):
    """What knows of the module whose code is read."""

    def call(self, function: Any, values: list[Any], named: dict[str, Any]) -> Any:
        """What a call gives."""

    def attribute(self, owner: Any, name: str) -> Any:
        """What an attribute of a value is."""

    def elements(self, owner: Child) -> list[Any]:
        """The modules in a list of them."""


class Expressions:
    """What the expressions in a function mean.

    Args:
        reader: What knows of the module.
        function: The function.
    """

    def __init__(self, reader: Reader, function: types.FunctionType) -> None:
        """See the class."""
        self._reader, self._function = reader, function
        self._names: dict[str, Any] = {}

    def _assign(self, target: ast.expr, value: Any) -> None:
        raise NotImplementedError

    def _value(self, node: ast.expr) -> Any:
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is None:
            raise UnreadableError(f"{type(node).__name__} cannot be read")
        return method(node)

    def _constant(self, node: ast.Constant) -> Any:
        return Plain(node.value)

    def _joinedstr(self, node: ast.JoinedStr) -> Any:
        return Plain()

    def _name(self, node: ast.Name) -> Any:
        if node.id in self._names:
            found = self._names[node.id]
            if isinstance(found, Conflict):
                raise UnreadableError(f"{node.id} means different things after different branches")
            return found
        inner = inspect.getclosurevars(self._function).nonlocals if self._function.__closure__ else {}
        space = {**vars(builtins), **self._function.__globals__, **inner}
        if node.id not in space:
            return Plain()
        return wrap(space[node.id])

    def _attribute(self, node: ast.Attribute) -> Any:
        found = self._reader.attribute(self._value(node.value), node.attr)
        return Plain() if isinstance(found, Bound) and isinstance(found.owner, Plain) else found

    def _tuple(self, node: ast.Tuple | ast.List) -> Any:
        parts: list[Any] = []
        for part in node.elts:
            if isinstance(part, ast.Starred):
                inner = self._value(part.value)
                if isinstance(inner, (tuple, list)):
                    parts += inner
                elif isinstance(inner, (Units, Size, Many)):
                    raise UnreadableError("spreads what depends on units")
                else:
                    parts.append(Star())
            else:
                parts.append(self._value(part))
        return tuple(parts)

    def _list(self, node: ast.List) -> Any:
        return list(self._tuple(node))

    def _dict(self, node: ast.Dict) -> Any:
        if is_tainted([self._value(value) for value in node.values]):
            raise UnreadableError("puts units into a dictionary")
        return Plain()

    def _ifexp(self, node: ast.IfExp) -> Any:
        known = truth_of(self._value(node.test))
        if known is None:
            return merge(self._value(node.body), self._value(node.orelse))
        return self._value(node.body if known else node.orelse)

    def _boolop(self, node: ast.BoolOp) -> Any:
        values = [self._value(value) for value in node.values]
        truths = [truth_of(value) for value in values]
        wanted = isinstance(node.op, ast.Or)
        if wanted in truths:
            return Plain(wanted)
        if None not in truths:
            return Plain(not wanted)
        found = [value for value in values if isinstance(value, (Units, Size, tuple))]
        return merge(found[0], Plain()) if found else Plain()

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        value = self._value(node.operand)
        if isinstance(node.op, ast.Not):
            truth = truth_of(value)
            return Plain() if truth is None else Plain(not truth)
        if isinstance(value, Plain):
            return Plain(-value.value) if isinstance(node.op, ast.USub) and _is_number(value.value) else Plain()
        return value

    def _compare(self, node: ast.Compare) -> Any:
        values = [self._value(part) for part in (node.left, *node.comparators)]
        units = [value for value in values if isinstance(value, Units)]
        if units and not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            return align(values)
        if len(values) == 2:
            one, other = values
            is_none = [isinstance(v, Plain) and v.value is None for v in values]
            if isinstance(node.ops[0], (ast.Is, ast.IsNot)) and any(is_none):
                second = one if is_none[1] else other
                if all(is_none):
                    return Plain(isinstance(node.ops[0], ast.Is))
                if not isinstance(second, Plain) or not isinstance(second.value, Unknown):
                    return Plain(isinstance(node.ops[0], ast.IsNot))
            elif all(isinstance(v, Plain) and not isinstance(v.value, Unknown) for v in values):
                if isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                    return Plain((one.value == other.value) is isinstance(node.ops[0], ast.Eq))
        return Plain()

    def _binop(self, node: ast.BinOp) -> Any:
        left, right = self._value(node.left), self._value(node.right)
        if isinstance(node.op, ast.MatMult):
            return multiply(left, right)
        if isinstance(node.op, ast.Add) and (isinstance(left, (tuple, list)) or isinstance(right, (tuple, list))):
            return (
                *(left if isinstance(left, (tuple, list)) else (Star(),)),
                *(right if isinstance(right, (tuple, list)) else (Star(),)),
            )
        if isinstance(left, (Plain, Size)) and isinstance(right, (Plain, Size)):
            number = _calculate(node.op, left.value, right.value)
            return Size(number) if is_tainted([left, right]) else Plain(number)
        return combine([left, right])

    def _subscript(self, node: Any, where: ast.expr | None = None) -> Any:
        owner, index = (self._value(node.value), node.slice) if where is None else (node, where)
        if isinstance(owner, Units):
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            return take(owner, [self._index(part) for part in parts])
        if isinstance(owner, (tuple, list)):
            return self._take_part(tuple(owner), index)
        if isinstance(owner, Many):
            return owner.value if not isinstance(index, ast.Slice) else owner
        if isinstance(owner, Known):
            return self._reader.attribute(owner, "__getitem__") if not isinstance(owner.object, dict) else Plain()
        if isinstance(owner, Child):
            return self._reader.attribute(owner, str(getattr(self._value(index), "value", None)))
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        inner = [self._index(part) for part in parts]
        return Size() if isinstance(owner, Size) or is_tainted(inner) else Plain()

    def _take_part(self, owner: tuple[Any, ...], index: ast.expr) -> Any:
        if isinstance(index, ast.Slice):
            ends = [None if end is None else self._value(end) for end in (index.lower, index.upper)]
            numbers = [None if end is None else getattr(end, "value", UNKNOWN) for end in ends]
            if index.step is not None or any(isinstance(number, Unknown) for number in numbers):
                raise UnreadableError("takes a part that is not written in the code")
            lower, upper = numbers
            return owner[lower:upper]  # type: ignore[index]
        place = getattr(self._value(index), "value", None)
        if type(place) is not int:
            return functools.reduce(merge, owner)
        if any(isinstance(part, Star) for part in owner) and place >= 0:
            return Plain()
        if not -len(owner) <= place < len(owner):
            raise UnreadableError("takes a part that is not there")
        return owner[place]

    def _index(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Slice):
            ends = [self._value(end) for end in (node.lower, node.upper, node.step) if end is not None]
            return slice(None) if not ends else slice(0, 1, is_tainted(ends))
        value = self._value(node)
        if isinstance(value, Plain) and (value.value is None or value.value is Ellipsis):
            return value.value
        return value

    def _call(self, node: ast.Call) -> Any:
        values = list(self._tuple(ast.Tuple([*node.args], ast.Load())))
        named = {key.arg: self._value(key.value) for key in node.keywords if key.arg is not None}
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            raise UnreadableError("calls super(), which is not followed")
        if isinstance(node.func, ast.Attribute) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.func):
            eager = [value for value in values if isinstance(value, Known)]
            return eager[0] if eager else Plain()
        if isinstance(node.func, ast.Attribute):
            function = self._reader.attribute(self._value(node.func.value), node.func.attr)
        else:
            function = self._value(node.func)
        if isinstance(function, Known) and not is_tainted([*values, *named.values()]):
            values = [value for value in values if not isinstance(value, Star)]
        return self._reader.call(function, values, named)

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp) -> Any:
        if len(node.generators) != 1 or node.generators[0].ifs:
            raise UnreadableError("a comprehension of several loops cannot be read")
        generator = node.generators[0]
        over = self._value(generator.iter)
        before = dict(self._names)
        found = []
        for element in over if isinstance(over, (tuple, list)) else [element_of(over)]:
            self._assign(generator.target, element)
            found.append(self._value(node.elt))
        self._names = before
        if isinstance(over, (tuple, list)):
            return tuple(found)
        return Size() if isinstance(over, Size) else Many(found[0])

    _generatorexp = _listcomp


def element_of(value: Any) -> Any:
    """What one of the elements of a value is.

    Args:
        value: What is gone through.

    Returns:
        The same for all elements.

    Raises:
        UnreadableError: If these are single units.
    """
    if isinstance(value, Many):
        return value.value
    if isinstance(value, Units):
        raise UnreadableError("goes through a tensor of units one by one")
    return Size() if isinstance(value, Size) else Plain()


def truth_of(value: Any) -> bool | None:
    """Whether a condition holds.

    Args:
        value: What the condition is.

    Returns:
        None if that is not known.
    """
    if isinstance(value, Plain):
        return None if isinstance(value.value, Unknown) else bool(value.value)
    return True if isinstance(value, Child) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _calculate(op: ast.operator, left: Any, right: Any) -> Any:
    if not (_is_number(left) and _is_number(right)):
        return UNKNOWN
    try:
        return {
            ast.Add: lambda: left + right,
            ast.Sub: lambda: left - right,
            ast.Mult: lambda: left * right,
            ast.FloorDiv: lambda: left // right,
            ast.Div: lambda: left / right,
            ast.Pow: lambda: left**right,
        }.get(type(op), lambda: UNKNOWN)()
    except ArithmeticError:
        return UNKNOWN
