"""Reading one function: its statements, and what its names mean after each."""

from __future__ import annotations

import ast
import functools
import types
from typing import Any

from .axes import Many, Plain, Star, Units, UnreadableError, align, reduce
from .expressions import Expressions, Reader, element_of, truth_of
from .values import Child, is_tainted, merge


class Scope(Expressions):
    """The names of one call of a function.

    Args:
        reader: What knows of the module.
        function: The function.
        tree: Its syntax tree.
        values: What it is given.
        named: What it is given by name.
    """

    def __init__(
        self,
        reader: Reader,
        function: types.FunctionType,
        tree: ast.FunctionDef,
        values: list[Any],
        named: dict[str, Any],
    ) -> None:
        """See the class."""
        super().__init__(reader, function)
        self._tree = tree
        self._results: list[Any] = []
        self._bind(list(values), dict(named))

    def run(self) -> Any:
        """What the function returns.

        Raises:
            UnreadableError: If something is done to units of which it cannot be told that they stay by themselves.
        """
        self._block(self._tree.body)
        return functools.reduce(merge, self._results) if self._results else Plain(None)

    def _bind(self, values: list[Any], named: dict[str, Any]) -> None:
        arguments = self._tree.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
        defaults |= {
            a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None
        }
        for name in [*names, *(argument.arg for argument in arguments.kwonlyargs)]:
            if values and name in names:
                self._names[name] = values.pop(0)
            elif name in named:
                self._names[name] = named.pop(name)
            elif name in defaults:
                self._names[name] = self._value(defaults[name])
            else:
                self._names[name] = Plain()
        if is_tainted([*values, *named.values()]) and not (arguments.vararg or arguments.kwarg):
            raise UnreadableError(f"{self._tree.name} is given more than it takes")
        if arguments.vararg:
            self._names[arguments.vararg.arg] = tuple(values)
        if arguments.kwarg:
            if is_tainted(named.values()):
                raise UnreadableError(f"{self._tree.name} is given units by other names")
            self._names[arguments.kwarg.arg] = Plain()
        is_top = not any(True for value in self._names.values() if isinstance(value, Units))
        if is_top:  # of a mask that may be there or not, both cases are read
            for name, value in self._names.items():
                if isinstance(value, Plain) and value.value is None and name not in named:
                    self._names[name] = Plain()

    # Statements: each block says whether it ends the function.

    def _block(self, body: list[ast.stmt]) -> bool:
        for statement in body:
            try:
                if self._statement(statement):
                    return True
            except UnreadableError as error:
                if not error.args[0].endswith(")"):
                    text = ast.unparse(statement).splitlines()[0][:100]
                    error = UnreadableError(f"{error.args[0]} (in {self._function.__qualname__}: {text})")
                raise error from None
        return False

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            self._results.append(Plain(None) if node.value is None else self._value(node.value))
            return True
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Assign):
            value = self._value(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._assign(node.target, self._value(node.value))
        elif isinstance(node, ast.AugAssign):
            read = ast.copy_location(ast.BinOp(_loaded(node.target), node.op, node.value), node)
            self._assign(node.target, self._value(read))
        elif isinstance(node, ast.Expr):
            self._value(node.value)
        elif isinstance(node, ast.If):
            return self._branch(node)
        elif isinstance(node, (ast.For, ast.While)):
            self._loop(node)
        elif isinstance(node, ast.With):
            return self._block(node.body)
        elif not isinstance(
            node, (ast.Pass, ast.Assert, ast.Delete, ast.Import, ast.ImportFrom, ast.Continue, ast.Break)
        ):
            raise UnreadableError(f"{type(node).__name__} cannot be read")
        return False

    def _branch(self, node: ast.If) -> bool:
        known = truth_of(self._value(node.test))
        if known is not None:
            return self._block(node.body if known else node.orelse)
        before = dict(self._names)
        first_ends = self._block(node.body)
        after, self._names = self._names, dict(before)
        second_ends = self._block(node.orelse)
        if first_ends and second_ends:
            return True
        if second_ends:
            self._names = after
        elif not first_ends:
            self._names = {
                name: merge(after[name], self._names[name]) if name in after and name in self._names else value
                for name, value in {**self._names, **after}.items()
            }
        return False

    def _loop(self, node: ast.For | ast.While) -> None:
        passes: list[Any] = [None]
        if isinstance(node, ast.For):
            over = self._value(node.iter)
            if isinstance(over, Child):
                over = self._reader.elements(over)
            passes = list(over) if isinstance(over, (tuple, list)) else [element_of(over)] * 2
        for element in passes:
            if isinstance(node, ast.For):
                self._assign(node.target, element)
            before = dict(self._names)
            self._block(node.body)
            self._names = {name: merge(before.get(name, value), value) for name, value in self._names.items()}

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, Units):
                value = Many(reduce(value, [0], keep=False))
            parts = value if isinstance(value, tuple) else (element_of(value),) * len(target.elts)
            if len(parts) != len(target.elts) or any(isinstance(part, (ast.Starred, Star)) for part in parts):
                raise UnreadableError("takes apart what has another number of parts")
            for inner, piece in zip(target.elts, parts, strict=True):
                self._assign(inner, piece)
        elif isinstance(target, ast.Subscript):
            owner = self._value(target.value)
            part = self._subscript(owner, target.slice) if isinstance(owner, Units) else Plain()
            if is_tainted([part, value]):
                align([part, value])
                if not isinstance(owner, Units):
                    raise UnreadableError("stores units in another tensor")
        elif not isinstance(target, ast.Attribute):
            raise UnreadableError(f"{type(target).__name__} cannot be read")


def _loaded(target: ast.expr) -> ast.expr:
    found = ast.parse(ast.unparse(target), mode="eval").body
    return ast.copy_location(found, target)
