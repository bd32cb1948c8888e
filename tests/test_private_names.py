"""docs/private-names.md lists exactly the private names of other packages that the code uses, and where."""

import importlib
import re
from pathlib import Path

import pytest
from house import find_private_names

ROOT = Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| `([\w.]+)` \| (\w+) \| ([\w, ]+) \| .+ \| (\S+\.py) \|$",
    (ROOT / "docs" / "private-names.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_the_table_names_what_the_code_uses_and_where():
    found = {
        name: sorted({Path(place.rpartition(":")[0]).with_suffix("").parts[1] for place in places})
        for name, places in find_private_names(ROOT).items()
    }
    assert {name: used_in.split(", ") for name, _, used_in, _ in ROWS} == found
    assert [name for name, *_ in ROWS] == sorted(name for name, *_ in ROWS)


@pytest.mark.parametrize("path", sorted({path for *_, path in ROWS}))
def test_the_tests_that_it_names_are_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", [name for name, package, *_ in ROWS if "." in name])
def test_names_in_modules_are_there(name):
    """All but operators, which are made when they are asked for."""
    path, _, last = name.rpartition(".")
    if path.startswith("torch.ops."):
        pytest.skip("an operator")
    assert hasattr(importlib.import_module(path), last) or importlib.util.find_spec(name) is not None
