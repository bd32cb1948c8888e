"""What the package does to other packages: which of their functions it replaces, and which private names it uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from house_code import PACKAGE, Source, read_sources

_PRIVATE = re.compile(r"_[A-Za-z]\w*")
_PRIVATE_PATH = re.compile(r"([a-z]\w*(?:\.\w+)*\._[A-Za-z]\w*)\.?")
_PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}  # those of named tuples, which are documented
_AFFIXES = {"startswith", "endswith", "removeprefix", "removesuffix", "replace", "split", "join"}
_ADDING = {"insert", "append", "appendleft", "extend", "add", "update", "setdefault", "__setitem__"}
_WRAPPERS = {"classmethod", "staticmethod", "property", "partial", "partialmethod", "MethodType"}

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Scope = Mapping[str, ast.AST]


def find_patches(root: Path) -> dict[str, list[str]]:
    """Find where behaviour of other packages is replaced: on their classes, their modules or their objects.

    That is where an attribute of something that is not ours (a class of ours, or its `self`) is set to a function or
    object of ours, or is `__class__` or one that we call elsewhere or read of a class; and where something is put into
    a collection of another module.
    A function of ours that sets such attributes for others counts where it is called.

    Args:
        root: The checkout.

    Returns:
        For each `file target` the places, as `file:line`.
    """
    sources = read_sources(root)
    nodes = [node for source in sources for node in ast.walk(source.tree)]
    known = {name: made for source in sources for name, made in _find_made(source.tree).items()}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)} | {"__class__"}
    called |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_class(node.value)}
    setters = {name for name, made in known.items() if isinstance(made, Function) and _sets_attributes(made)}
    found: dict[str, list[str]] = {}
    for source in sources:
        imports = [node for node in ast.walk(source.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        bound = {(a.asname or a.name).partition(".")[0]: a.name for node in imports for a in node.names}
        own = {a.asname or a.name for n in imports if isinstance(n, ast.ImportFrom) and n.level for a in n.names}
        scope = {name: known[bound[name]] for name in own if bound[name] in known}
        reader = _Patches(called, setters, bound.keys() - own)
        for target, line in reader.read(source.tree, scope, is_own=False):
            found.setdefault(f"{source.file} {target}", []).append(f"{source.file}:{line}")
    return found


def find_private_names(root: Path) -> dict[str, list[str]]:
    """Find the private names of other packages that the package uses.

    A name is theirs if it begins with one underscore and nothing of ours defines it: no function, class, variable or
    parameter, and no attribute of a `self`; or if it is a method that only a base class of theirs can call. Names in
    strings count, since `getattr`, `vars` and others take them, but not what is only compared with parts of strings.

    Args:
        root: The checkout.

    Returns:
        For each name the places, as `file:line`. A name that is read of an imported module has the module's path.
    """
    sources = read_sources(root)
    own = _find_own_names(sources)
    found: dict[str, list[str]] = {}
    for source in sources:
        for name, line in sorted(_find_foreign(source.tree, own), key=lambda place: place[1]):
            place = f"{source.file}:{line}"
            if place not in found.setdefault(name, []):
                found[name].append(place)
    return dict(sorted(found.items()))


class _Patches(NamedTuple):
    """What decides whether an attribute that is set is behaviour of another package."""

    called: set[str]  # attributes that our code calls
    setters: set[str]  # our functions that set attributes whose names they are given
    foreign: set[str]  # what is imported from elsewhere

    def read(self, node: ast.AST, scope: Scope, *, is_own: bool) -> Iterator[tuple[str, int]]:
        """Targets and lines; `scope` has our functions and classes, and `self` is of a class of ours or not."""
        if isinstance(node, Function):
            parameters = _find_parameters(node)
            is_own = is_own and not (parameters & {"self", "cls"}) or getattr(node, "is_method", False)
            scope = {name: made for name, made in scope.items() if name not in parameters}
        if isinstance(node, Function | ast.Module):
            scope = {**scope, **_find_made(node)}
        for owner, name, value in self._find_set(node):
            root = owner.id if isinstance(owner, ast.Name) else ""
            of_ours = (root in ("self", "cls") and is_own) or root in scope
            if not of_ours and (name in self.called or _is_ours(value, scope)):
                yield f"{ast.unparse(owner)}.{name}", node.lineno  # type: ignore[attr-defined]
        for collection in _find_changed(node):
            first = collection
            while isinstance(first, ast.Attribute):
                first = first.value
            if isinstance(collection, ast.Attribute) and isinstance(first, ast.Name) and first.id in self.foreign:
                yield ast.unparse(collection), node.lineno  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            if isinstance(node, ast.ClassDef) and isinstance(child, Function):
                child.is_method = True  # type: ignore[union-attr]
            yield from self.read(child, scope, is_own=is_own)

    def _find_set(self, node: ast.AST) -> Iterator[tuple[ast.expr, str, ast.expr | None]]:
        """What a statement or call sets: the owner, the attribute and its value."""
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = [*zip(target.elts, node.value.elts, strict=False)]
                for part, value in pairs:
                    if isinstance(part, ast.Attribute):
                        yield part.value, part.attr, value
                    elif isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant):
                        owner = _find_owner_of_dict(part.value)
                        if owner is not None:
                            yield owner, str(part.slice.value), value
        elif isinstance(node, ast.For) and any(_is_setattr(inner) for inner in ast.walk(node)):
            for row in ast.walk(node.iter):  # `for owner, name, ours in ((A, "a", f), (B, "b", g))`
                if isinstance(row, ast.Tuple) and len(row.elts) == 3 and isinstance(row.elts[1], ast.Constant):
                    yield row.elts[0], str(row.elts[1].value), row.elts[2]
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            if _name_of(node.func) in self.setters | {"setattr"}:
                others = [*node.args[2:], *(keyword.value for keyword in node.keywords)]
                yield node.args[0], str(node.args[1].value), others[0] if others else node.func


def _find_made(node: ast.AST) -> dict[str, ast.AST]:
    """The functions and classes that are defined in a module or function, not in those inside of it."""
    found: dict[str, ast.AST] = {}
    waiting = [*ast.iter_child_nodes(node)]
    while waiting:
        child = waiting.pop()
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[child.name] = child
            continue
        if isinstance(child, ast.Assign) and isinstance(child.value, ast.Lambda):
            found |= {target.id: child.value for target in child.targets if isinstance(target, ast.Name)}
        waiting += ast.iter_child_nodes(child)
    return found


def _is_ours(value: ast.expr | None, scope: Scope) -> bool:
    """Whether a value is a function of ours, or an object of a class of ours, as far as it can be read."""
    if isinstance(value, ast.IfExp):
        return _is_ours(value.body, scope) or _is_ours(value.orelse, scope)
    if not isinstance(value, ast.Call):
        return isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in scope)
    made = scope.get(_name_of(value.func))
    passes = isinstance(value.func, ast.Call) or _name_of(value.func) in _WRAPPERS  # `wraps(function)(ours)`
    if isinstance(made, ast.FunctionDef):
        returned = {n.value.id for n in ast.walk(made) if isinstance(n, ast.Return) and isinstance(n.value, ast.Name)}
        passes = bool(returned & _find_parameters(made))
        made = None if returned.isdisjoint(_find_made(made)) else made
    given = [*value.args, *(keyword.value for keyword in value.keywords)]
    return made is not None or (passes and any(_is_ours(argument, scope) for argument in given))


def _find_changed(node: ast.AST) -> Iterator[ast.expr]:
    """The collection that a statement or call puts something into."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ADDING:
        yield node.func.value
    for target in node.targets if isinstance(node, ast.Assign | ast.Delete) else ():
        if isinstance(target, ast.Subscript):
            yield target.value


def _find_owner_of_dict(value: ast.expr) -> ast.expr | None:
    """What `vars(x)` or `x.__dict__` is of."""
    if isinstance(value, ast.Attribute) and value.attr == "__dict__":
        return value.value
    is_vars = isinstance(value, ast.Call) and _name_of(value.func) == "vars" and value.args
    return value.args[0] if is_vars else None  # type: ignore[attr-defined]


def _find_parameters(function: ast.AST) -> set[str]:
    arguments = function.args  # type: ignore[attr-defined]
    return {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}


def _sets_attributes(function: ast.AST) -> bool:
    """Whether a function sets attributes whose names are among its parameters."""
    names = _find_parameters(function)
    given = [node.args[1] for node in ast.walk(function) if _is_setattr(node)]  # type: ignore[attr-defined]
    return any(isinstance(name, ast.Name) and name.id in names for name in given)


def _is_setattr(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name_of(node.func) == "setattr"


def _is_class(value: ast.expr) -> bool:
    """Whether an expression looks like a class, whose attributes are functions mostly."""
    is_type = isinstance(value, ast.Call) and _name_of(value.func) == "type"
    return is_type or _name_of(value)[:1].isupper()


def _name_of(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))


def _find_own_names(sources: Iterable[Source]) -> set[str]:
    """All names with an underscore that the package itself defines, but for methods that it does not call."""
    nodes = [node for source in sources for node in ast.walk(source.tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    names = {node.name for node in classes}
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    theirs = set()
    for kind in classes:
        if any(_name_of(base) not in names for base in kind.bases):
            theirs |= {m.name for m in kind.body if isinstance(m, ast.FunctionDef) and m.name not in read}
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name not in theirs:
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names |= {node.id}
        elif isinstance(node, ast.arg):
            names |= {node.arg}
    for node in (node for kind in classes for node in ast.walk(kind)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _name_of(node.value) == "self":
            names |= {node.attr}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.__dict__.update":
            names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return names


def _find_foreign(tree: ast.Module, own: set[str]) -> Iterator[tuple[str, int]]:
    """The private names of others in one module, with their lines."""
    nodes = list(ast.walk(tree))
    imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    bound = {a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0] for a in imports}
    passed_over = _find_affixes(nodes)
    for node in nodes:
        path = ""
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                yield from ((name, node.lineno) for name in _find_private_parts(base + alias.name))
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            first: ast.expr = node
            while isinstance(first, ast.Attribute):
                first = first.value
            known = bound.get(first.id) if isinstance(first, ast.Name) else None
            path = ast.unparse(node).replace(first.id, known, 1) if known else node.attr  # type: ignore[attr-defined]
            path = path if _PRIVATE.fullmatch(node.attr) else ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PACKAGE not in node.value:
            is_path = _PRIVATE_PATH.fullmatch(node.value)
            path = node.value.rstrip(".") if is_path or id(node) not in passed_over else ""
        elif isinstance(node, ast.keyword | ast.FunctionDef):
            path = (node.arg if isinstance(node, ast.keyword) else node.name) or ""
        if path.rpartition(".")[2] not in own | _PUBLIC and (
            _PRIVATE.fullmatch(path) or _PRIVATE_PATH.fullmatch(path)
        ):
            yield path, node.lineno  # type: ignore[attr-defined]


def _find_private_parts(path: str) -> Iterator[str]:
    """The beginnings of a dotted path that end with a private name."""
    parts = path.split(".")
    yield from (".".join(parts[: n + 1]) for n, part in enumerate(parts) if _PRIVATE.fullmatch(part))


def _find_affixes(nodes: Iterable[ast.AST]) -> set[int]:
    """The strings that are parts of strings, by identity, also by way of a variable."""
    names, found = set(), []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            found += node.values
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _AFFIXES:
            found += node.args
            names |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) in names for target in node.targets):
            found.append(node.value)
    return {id(part) for expression in found for part in ast.walk(expression)}
