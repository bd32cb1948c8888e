"""docs/house.py: what it reads off a small package, and that its picture is the same each time."""

from pathlib import Path

import pytest
from house import find_imports, find_patches, find_private_names, room_of
from house_code import find_cycle, find_levels, find_long_functions, find_room_imports
from house_picture import draw_rooms

HOOKS = """
import sys
from typing import TYPE_CHECKING

from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, Trainer

if TYPE_CHECKING:
    from .other import Type
from .room import after, replace, replacing


class Own:
    def __init__(self):
        self._own = self.value = after

    def step(self, model):
        from .room.inner import helper

        self.run, self._mine = helper, 3
        model.size, model.step = 3, self.value  # the first is data, the second called below
        model._theirs(_given=self._own)
        return "_name" in vars(model) and "text".endswith("_suffix") and f"{model}_part"


def train(self):
    self._load = train
    self.step()


def install():
    PreTrainedModel.post_init = after(PreTrainedModel.post_init)
    replace(Trainer, "train", train)
    for owner, name, ours in ((Trainer, "save", train), (Trainer, "load", train)):
        setattr(owner, name, ours)
    sys.meta_path.insert(0, Own())


@replacing(Trainer, "evaluate")
def evaluate(self):
    vars(self)["forward"] = lambda: None
"""
ROOM = """
from .inner import helper


def after(build):
    def post_init(self):
        build(self)

    return post_init


def replace(owner, name, ours):
    setattr(owner, name, ours)


def replacing(owner, name):
    def put(ours):
        setattr(owner, name, ours)

    return put
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout of a small package of the same name, with a room and a cycle."""
    long = "def helper():\n    '''Words.'''\n" + "    x = 1\n" * 40
    files = {
        "__init__.py": "from . import hooks\n",
        "hooks.py": HOOKS,
        "other.py": "from .room.inner import longer\n",
        "room/__init__.py": ROOM,
        "room/inner.py": f"{long}\n\ndef longer():\n    from ..other import x\n{'    x = 1' + chr(10)}"
        + "    x = 1\n" * 39,
    }
    for name, text in files.items():
        path = tmp_path / "hf_slim" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_found_wherever_they_run_and_counted_in_levels_and_cycles(root: Path) -> None:
    imports = find_imports(root)
    assert imports == {
        "hf_slim": {"hf_slim.hooks"},
        "hf_slim.hooks": {"hf_slim.room", "hf_slim.room.inner"},
        "hf_slim.other": {"hf_slim.room.inner"},
        "hf_slim.room": {"hf_slim.room.inner"},
        "hf_slim.room.inner": {"hf_slim.other"},
    }
    assert find_cycle(imports) == {"hf_slim.other", "hf_slim.room.inner"}
    assert find_cycle({"a": {"b"}, "b": set()}) == set()
    assert find_levels(imports)["hf_slim"] == 4
    assert find_room_imports(root) == {
        "hf_slim": {"hooks": 1},
        "hooks": {"room": 2},
        "other": {"room": 1},
        "room": {"other": 1},
    }
    assert [room_of(name) for name in ("hf_slim", "hf_slim.room", "hf_slim.room.a.b")] == ["hf_slim", "room", "room"]


def test_a_function_is_long_by_its_body(root: Path) -> None:
    assert find_long_functions(root) == ["hf_slim/room/inner.py:45 longer, 41"]


def test_patches_of_other_packages_are_found(root: Path) -> None:
    assert {name.partition(" ")[2] for name in find_patches(root)} == {
        "PreTrainedModel.post_init",
        "Trainer.evaluate",
        "Trainer.load",
        "Trainer.save",
        "Trainer.train",
        "model.step",
        "self._load",
        "self.forward",
        "sys.meta_path",
    }


def test_private_names_of_other_packages_are_found(root: Path) -> None:
    assert find_private_names(root) == {
        "_given": ["hf_slim/hooks.py:22"],
        "_load": ["hf_slim/hooks.py:27"],
        "_name": ["hf_slim/hooks.py:23"],
        "_theirs": ["hf_slim/hooks.py:22"],
        "torch.utils._pytree": ["hf_slim/hooks.py:5"],
    }


def test_the_picture_is_the_same_each_time_and_names_rooms_and_modules(root: Path, tmp_path: Path) -> None:
    draw_rooms(root, tmp_path / "a.svg")
    draw_rooms(root, tmp_path / "b.svg")
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    assert all(f">{text}</text>" in picture for text in ("__init__", "hooks", "room", "inner", "other"))
