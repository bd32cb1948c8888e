"""Attention whose code gives the heads' outputs the width of its input, and how it is made to take fewer heads.

Some modules end with `attn_output.reshape(batch, length, embed_dim)`, `embed_dim` being the last size of their input.
With fewer heads there are fewer values, so the number is replaced by -1 in the code: the size that is left, which for
all heads is the same. This file needs nothing but Python, because it is copied into the remote code of slim models.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

_RESHAPING = ("view", "reshape")


def find_width(function: ast.FunctionDef) -> str | None:
    """Find out whether a method reshapes results to a width that it has from an input.

    Args:
        function: The method's syntax tree.

    Returns:
        How the code writes that width, or None.
    """
    return next((width for _, width in _find_sites(function)), None)


def can_infer(kind: type) -> bool:
    """Whether all those widths in a class can be left to be inferred.

    Args:
        kind: A class of modules.

    Returns:
        True if `infer_widths` works for it.
    """
    known: Any = kind
    return _inferring(known) is not None


def infer_widths(module: Any) -> None:
    """Make a module infer those widths from then on; its class becomes a subclass that does.

    Args:
        module: The module; changed in place.
    """
    kind: Any = type(module)
    if not getattr(kind, "infers_widths", False):
        module.__class__ = _inferring(kind)


def written_class(kind: type) -> type:
    """The class as it is written in a file: without the subclass that `infer_widths` made.

    Args:
        kind: A class of modules.

    Returns:
        The class itself, or the one that it was made from.
    """
    return kind.__mro__[1] if "infers_widths" in vars(kind) else kind


def root_of(call: ast.Call) -> str | None:
    """The name that a chain of calls begins with: `x` in `x.transpose(0, 1).view(2, 3)`.

    Args:
        call: The last call.

    Returns:
        The name, None if it begins with something else.
    """
    node: ast.AST = call
    while isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def arguments_of(function: ast.FunctionDef) -> set[str]:
    """The names of a method's parameters, without `self`.

    Args:
        function: The method's syntax tree.

    Returns:
        The names.
    """
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)} - {"self"}


@functools.cache
def _inferring(kind: type) -> type | None:
    """The subclass whose methods infer the widths; None if some cannot be inferred."""
    methods: dict[str, Any] = {}
    for function in vars(kind).values():
        if not inspect.isfunction(function):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        if not isinstance(tree.body[0], ast.FunctionDef):
            return None
        sites = [site for site, _ in _find_sites(tree.body[0])]
        if not sites:
            continue
        if any(ast.unparse(size) == "-1" for site in sites for size in _sizes(site)) or "super()" in ast.unparse(tree):
            return None
        for site in sites:
            _sizes(site)[-1] = ast.copy_location(ast.UnaryOp(ast.USub(), ast.Constant(1)), site)
        code = compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec")
        exec(code, inspect.unwrap(function).__globals__, methods)
    made = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "infers_widths": True}
    return type(kind.__name__, (kind,), {**methods, **made})


def _sizes(site: ast.Call) -> list[ast.expr]:
    """The sizes that a reshape asks for."""
    last = site.args[-1]
    return last.elts if isinstance(last, (ast.Tuple, ast.List)) else site.args


def _find_sites(function: ast.FunctionDef) -> list[tuple[ast.Call, str]]:
    """The reshapes of results, before the output projection, whose last size is one of an input's; and that size."""
    inputs = arguments_of(function)
    names = set()
    projections = [0]
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            last = node.targets[0].elts[-1]
            if isinstance(last, ast.Name) and ast.unparse(node.value).removesuffix("()") in {
                f"{name}.{size}" for name in inputs for size in ("size", "shape")
            }:
                names.add(last.id)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith("self.") and ("out" in called or called.endswith("proj")):
                projections.append(node.lineno)
    found = []
    for node in ast.walk(function):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        late = len(projections) > 1 and node.lineno > max(projections)
        if node.func.attr not in _RESHAPING or root_of(node) in inputs or late or not _sizes(node):
            continue
        last_sizes = {f"{name}.shape[-1]" for name in inputs}
        for part in ast.walk(_sizes(node)[-1]):
            text = ast.unparse(part) if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)) else ""
            of_object = (
                isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id != "self"
            )
            if text in names | last_sizes or (of_object and not text.endswith((".shape", ".size"))):
                found.append((node, text))
                break
    return found
