"""What the code of a checkout says of itself: modules and rooms, imports, long functions, patches, private names.

The code is read and not run, so that it may be that of another checkout.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = "hf_slim"
LAYERS = (
    *("modeling_hf_slim", "arguments", "structures", "parallel", "proof", "compaction", "costs", "training"),
    *("distillation", "saving", "exports", "one_shot", "bench", "cli", "hooks", PACKAGE),
)
"""The rooms in their order: each may import from those before it."""
LONG = 40
"""Lines from which on the body of a function is long."""


Graph = Mapping[str, set[str]]


class Source(NamedTuple):
    """One module: its dotted name, its file below the root, its number of lines, its syntax tree."""

    name: str
    file: str
    lines: int
    tree: ast.Module


@functools.cache
def read_sources(root: Path, folder: str = PACKAGE) -> tuple[Source, ...]:
    """Read all modules of a folder of a checkout, in the order of their files.

    Args:
        root: The checkout.
        folder: The package, or `tests`.

    Returns:
        The modules; that of an `__init__.py` has the name of its folder.
    """
    sources = []
    for path in sorted((root / folder).rglob("*.py")):
        file, text = path.relative_to(root), path.read_text(encoding="utf-8")
        parts = file.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(name, file.as_posix(), len(text.splitlines()), ast.parse(text)))
    return tuple(sources)


def find_imports(root: Path) -> dict[str, set[str]]:
    """Find which module of the package imports which, anywhere in it, but for what only a type checker reads.

    What a module takes from another room's `__init__.py` it imports from the module where that has it from.

    Args:
        root: The checkout.

    Returns:
        For each module's dotted name (`hf_slim.structures` is its `__init__.py`) those of the modules that it imports.
    """
    sources = read_sources(root)
    known = {source.name for source in sources}
    doors = {s.name: _find_door(s, known) for s in sources if s.file.endswith("/__init__.py")}
    imports = {}
    for source in sources:
        through = (doors.get(base, {}).get(name, base) for base, name in _find_targets(source, known))
        imports[source.name] = {target for target in through if target in known} - {source.name}
    return imports


def room_of(module: str) -> str:
    """The room of a module of the package: the first folder, or the module itself where it is in none.

    Args:
        module: Its dotted name.

    Returns:
        The room's name; that of the package for its own `__init__.py`.
    """
    return (module.split(".") + [module])[1]


def find_room_imports(root: Path) -> dict[str, dict[str, int]]:
    """Count the imports between rooms.

    Args:
        root: The checkout.

    Returns:
        For each room the other rooms that it imports from, with the number of its modules' imports.
    """
    rooms: dict[str, dict[str, int]] = {}
    for module, targets in find_imports(root).items():
        counts = rooms.setdefault(room_of(module), {})
        for room in sorted(map(room_of, targets)):
            if room != room_of(module):
                counts[room] = counts.get(room, 0) + 1
    return rooms


def find_cycle(imports: Graph) -> set[str]:
    """The largest set of modules each of which imports, by way of others, all others of it; empty if there is none."""
    cycles = [cycle for cycle in _find_components(imports).values() if len(cycle) > 1]
    return set(max(cycles, key=lambda cycle: (len(cycle), sorted(cycle)), default=()))


def find_levels(imports: Graph) -> dict[str, int]:
    """For each module the length of the longest chain of imports that begins with it, cycles counted as one module."""
    components = _find_components(imports)

    @functools.cache
    def find_level(cycle: frozenset[str]) -> int:
        others = {components[target] for module in cycle for target in imports[module]} - {cycle}
        return 1 + max(map(find_level, others), default=0)

    return {module: find_level(cycle) for module, cycle in components.items()}


def find_long_functions(root: Path) -> list[str]:
    """The functions whose body is long, without signature and docstring, as `file:line name, lines`."""
    found = []
    for source in read_sources(root):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > LONG:
                    found.append(f"{source.file}:{node.lineno} {node.name}, {lines}")
    return found


def _find_door(source: Source, known: set[str]) -> dict[str, str]:
    """For the names that a room's `__init__.py` gives the modules where it has them from."""
    return {name: base for base, name in _find_targets(source, known) if name}


def _find_targets(source: Source, known: set[str]) -> Iterator[tuple[str, str]]:
    """The modules that a module imports, with what from them; a name may be that of a module, too."""
    package = source.name if source.file.endswith("/__init__.py") else source.name.rpartition(".")[0]
    for node in _walk_run(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner, "") if inner in known else (base, alias.name)


def _walk_run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _walk_run(child)


def _find_components(imports: Graph) -> dict[str, frozenset[str]]:
    """For each module those that it is in a cycle with, itself included."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        waiting, seen = [module], {module}
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[module] = seen
    return {m: frozenset(other for other in reached[m] if m in reached[other]) for m in imports}
