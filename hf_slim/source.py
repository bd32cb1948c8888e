"""What a module's code reads of the module: from its source, without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .widths import arguments_of, find_width, root_of, written_class

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
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a class made at run time, around another one or with code of its own
            names = None if "forward" in vars(base) else names
            continue
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or function.name in _BUILDING:
                continue
            for name, chain in _self_reads(function):
                if name.startswith("config."):
                    config.add(name.removeprefix("config."))
                elif names is not None:
                    names.add(name)
                if not _shapes_a_result(function, chain):
                    used.add(name)
            replaced |= {
                node.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            }
            calls |= {
                node.func.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            }
            if width is None and base is kind:
                width = find_width(function)
    arguments = tuple(inspect.signature(kind.forward).parameters)
    read = None if names is None else frozenset(names)
    return Reads(read, frozenset(config), frozenset(used), frozenset(replaced), frozenset(calls), arguments, width)


def _self_reads(function: ast.FunctionDef) -> Iterator[tuple[str, list[ast.AST]]]:
    """Each `self.name` or `self.config.name` that is read, with the nodes around it, the innermost last."""
    todo: list[tuple[ast.AST, list[ast.AST]]] = [(function, [])]
    while todo:
        node, chain = todo.pop()
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr, chain
            elif ast.unparse(node.value) == "self.config":
                yield f"config.{node.attr}", chain
        todo += [(child, [*chain, node]) for child in ast.iter_child_nodes(node)]


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
