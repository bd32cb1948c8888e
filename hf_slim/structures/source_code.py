"""What a module's code reads of the module: from its source, without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from ..modeling_hf_slim import arguments_of, find_width, root_of, written_class

_BUILDING = ("__init__", "_init_weights", "reset_parameters")
"""Methods that build a module, for all its heads and channels."""
_GENERAL = ("torch.", "transformers.modeling_", "transformers.generation", "transformers.utils", "transformers.integr")
"""Modules whose classes know nothing of the heads or channels of those that inherit from them."""
_SHAPING = ("view", "reshape", "unflatten", "split")


@dataclass(frozen=True)
class Reads:
    """What the methods of a class read of `self`, those aside that build it.

    Args:
        names: Attributes that are read; None if the source cannot be had, so that any may be.
        config: Fields of `self.config` that are read.
        used: Of `names` those that are used otherwise than as the new shape of a result.
        replaced: Attributes that are set.
        calls: Names of the methods and functions that are called.
        arguments: Names of the parameters of `forward`.
        input_width: How the code writes the width of an input, if it gives that width to results.
    """

    names: frozenset[str] | None
    config: frozenset[str]
    used: frozenset[str]
    replaced: frozenset[str]
    calls: frozenset[str]
    arguments: tuple[str, ...]
    input_width: str | None


def find_reads(kind: type) -> Reads:
    """Read the source of a module's class and of the classes that it inherits from, up to the general ones.

    Args:
        kind: The class, of a `torch.nn.Module`.

    Returns:
        What its methods read.
    """
    written: Any = written_class(kind)
    return _find_reads(written)


@functools.cache
def find_mentioned(kind: Any) -> frozenset[str]:
    """The names of all attributes that the methods of a class mention, of `self` or of anything else.

    They are in the compiled code, so that this costs much less than `find_reads`.

    Args:
        kind: The class, of a `torch.nn.Module`.

    Returns:
        The names.
    """
    found: set[str] = set()
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(_GENERAL):
            continue
        codes = [function.__code__ for name, function in _written(base) if name not in _BUILDING]
        while codes:
            code = codes.pop()
            found.update(code.co_names)
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return frozenset(found)


@functools.cache
def _find_reads(kind: Any) -> Reads:
    names: set[str] | None = set()
    config: set[str] = set()
    used: set[str] = set()
    calls: set[str] = set()
    replaced: set[str] = set()
    width: str | None = None
    for base in kind.__mro__:
        if base is object or base.__module__.startswith(_GENERAL):
            continue
        try:
            functions = find_functions(base)
        except (OSError, TypeError):  # a class made at run time, around another one or with code of its own
            names = None if "forward" in vars(base) else names
            continue
        for function in functions:
            reads, stores, called = _walk(function)
            for name, chain in reads:
                if name.startswith("config."):
                    config.add(name.removeprefix("config."))
                elif names is not None:
                    names.add(name)
                if not _shapes_a_result(function, chain):
                    used.add(name)
            replaced |= stores
            calls |= called
            if width is None and base is kind:
                width = find_width(function)
    arguments = tuple(inspect.signature(kind.forward).parameters)
    read = None if names is None else frozenset(names)
    return Reads(read, frozenset(config), frozenset(used), frozenset(replaced), frozenset(calls), arguments, width)


def find_functions(kind: type) -> list[ast.FunctionDef]:
    """The syntax trees of a class's own functions, those aside that build it, with the functions inside them.

    Args:
        kind: The class.

    Returns:
        The trees.

    Raises:
        OSError: If the source cannot be had.
        TypeError: Likewise.
    """
    trees = [parse_function(function) for name, function in _written(kind) if name not in _BUILDING]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name not in _BUILDING]


def _written(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions in a class as they are written: those inside properties, static methods and decorators."""
    for name, value in vars(kind).items():
        inner = getattr(value, "fget", None) or getattr(value, "__func__", None)
        function = inspect.unwrap(value if inner is None else inner)
        if isinstance(function, FunctionType):
            yield name, function


@functools.cache
def parse_function(function: FunctionType) -> ast.FunctionDef:
    """The syntax tree of a function, from its own lines alone.

    Args:
        function: The function, unwrapped.

    Returns:
        The tree.

    Raises:
        OSError: If the source cannot be had.
    """
    try:
        tree = ast.parse(textwrap.dedent(_lines_of(function))).body[0]
    except SyntaxError:  # its lines end otherwise than thought
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise OSError(f"{function.__qualname__} is not written as a function")
    return tree


def _lines_of(function: FunctionType) -> str:
    """A function's source: from its first line to the next line that is not further in."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    begin = code.co_firstlineno - 1
    if begin >= len(lines):
        raise OSError(f"there is no source of {function.__qualname__}")
    indent = len(lines[begin]) - len(lines[begin].lstrip())
    end = max(line for _, _, line in code.co_lines() if line is not None)
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
        end += 1
    return "".join(lines[begin:end])


Read = tuple[str, list[ast.AST]]


def _walk(function: ast.FunctionDef) -> tuple[list[Read], set[str], set[str]]:
    """What a function reads of `self`, the attributes that it sets, and the methods and functions that it calls.

    Of `self` each `name` or `config.name` that is read, with the nodes around it, the innermost last.
    """
    reads: list[Read] = []
    stores: set[str] = set()
    calls: set[str] = set()
    chain: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store):
                stores.add(node.attr)
            elif isinstance(node.ctx, ast.Load):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    reads.append((node.attr, list(chain)))
                elif _is_config(node.value):
                    reads.append((f"config.{node.attr}", list(chain)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            calls.add(node.func.attr)
        chain.append(node)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.expr_context, ast.operator, ast.cmpop)):
                visit(child)
        chain.pop()

    visit(function)
    return reads, stores, calls


def _is_config(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "config"
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _shapes_a_result(function: ast.FunctionDef, chain: list[ast.AST]) -> bool:
    """Whether an expression stands in the new shape of something that is not an argument of the function."""
    inputs = arguments_of(function)
    in_tuple = False
    for node in reversed(chain):
        in_tuple = in_tuple or isinstance(node, ast.Tuple)
        if isinstance(node, (ast.Tuple, ast.Starred, ast.BinOp, ast.List)):
            continue
        if isinstance(node, ast.Call):
            shaping = isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPING
            return shaping and root_of(node) not in inputs
        return in_tuple and isinstance(node, ast.Assign)
    return False
