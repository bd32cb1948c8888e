"""A room imports only from rooms above it, and a module from modules before it, as docs/modules.md lists them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from house_picture import draw_rooms

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_slim"
PAGE = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "metrics" not in path.parts)


def read_page() -> dict[str, list[str]]:
    """The rooms in their order, with their modules in their order; a module of no room is under its own name."""
    rooms: dict[str, list[str]] = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        names = re.findall(r"^\| `([\w/]+)` \|", part, re.MULTILINE)
        title = part.partition("\n")[0]
        rooms |= {title: names} if (PACKAGE / title).is_dir() else {name: [] for name in names}
    return rooms


ROOMS = read_page()


def test_files_of_tests_have_names_of_their_own() -> None:
    """Those that do not are not collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_the_page_names_every_module_once() -> None:
    named = [f"{room}/{name}.py" for room, names in ROOMS.items() for name in names if not name.endswith("/")]
    named += [f"{room}/__init__.py" if names else f"{room}.py" for room, names in ROOMS.items()]
    assert sorted(named) == sorted(map(str, FILES))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_module_imports_only_what_stands_before_it(file: Path) -> None:
    order = list(ROOMS)
    room = str(file.parent) if len(file.parts) > 1 else file.stem
    for target in find_imports(file):
        if target.parent == file.parent and len(file.parts) > 1:  # the same room
            names = [name.partition("/")[0] for name in ROOMS[room]]
            assert file.stem == "__init__" or names.index(target.stem) < names.index(file.stem), target
        elif room.startswith(f"{target.parent}/"):  # a folder in a room is one of its modules
            outer = [name.partition("/")[0] for name in ROOMS[str(target.parent)]]
            assert outer.index(target.stem) < outer.index(room.rpartition("/")[2]), target
        else:
            assert str(target) in order, f"{target}: only what a room's __init__ names may be used"
            assert order.index(str(target)) < order.index(room), target


@pytest.mark.parametrize("room", [room for room, names in ROOMS.items() if names and room != "cli"])
def test_a_room_names_what_others_use_and_no_more(room: str) -> None:
    named = set(find_names(PACKAGE / room / "__init__.py"))
    used = {name for file in FILES for name in find_used(file, room)}
    assert named - used == set()


def test_the_picture_is_drawn_from_the_imports(tmp_path: Path) -> None:
    draw_rooms(ROOT, tmp_path / "rooms.svg")
    drawn, there = ((folder / "rooms.svg").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs"))
    assert re.findall("<!-- (.*?) -->", drawn) == re.findall("<!-- (.*?) -->", there)  # the texts, in their order


def find_imports(file: Path) -> Iterator[Path]:
    """The modules and rooms that a module imports, wherever in it, as paths in the package."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (folder / name.replace(".", "/") for name in names)


def find_names(init: Path) -> Iterator[str]:
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def find_used(file: Path, room: str) -> Iterator[str]:
    """What a module uses of a room."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            if str(file.parents[node.level - 1] / node.module.replace(".", "/")) == room:
                yield from (alias.name for alias in node.names)
