"""The modules import each other in one order only, the order that docs/modules.md lists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_slim"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_the_list_names_every_module_once() -> None:
    assert sorted(_order()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_earlier_ones(module: str) -> None:
    order = _order()
    earlier = order[: order.index(module)]
    assert [name for name in _imports(module) if name not in earlier] == []


def _order() -> list[str]:
    page = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)


def _imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it; `__init__` for the package itself."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"hf_slim.{node.module}"] if node.module else [f"hf_slim.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name == "hf_slim":
                yield "__init__"
            elif name.startswith("hf_slim."):
                yield name.split(".")[1]
