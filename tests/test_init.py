"""The public names, which are imported with their first use."""

import ast
import inspect
import pydoc

import pytest

import hf_slim


def test_each_public_name_is_there_once_and_where_it_is_said_to_be():
    named = {name: module for module, names in hf_slim._MODULES.items() for name in names}
    assert sorted(named) == hf_slim.__all__ == sorted(name for names in hf_slim._MODULES.values() for name in names)
    for name, module in named.items():
        assert f"{getattr(hf_slim, name).__module__}.".startswith(f"hf_slim.{module}.")


def test_type_checkers_see_the_same_names():
    (block,) = [
        node
        for node in ast.parse(inspect.getsource(hf_slim)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imported = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert imported == hf_slim._MODULES


def test_a_star_import_gives_the_public_names():
    names = {}
    exec("from hf_slim import *", names)
    assert names.keys() - {"__builtins__"} == set(hf_slim.__all__)


def test_dir_and_help_list_the_public_names():
    assert set(hf_slim.__all__) <= set(dir(hf_slim))
    text = pydoc.plain(pydoc.render_doc(hf_slim))
    assert all(name in text for name in hf_slim.__all__)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="^module 'hf_slim' has no attribute 'slim_everything'$"):
        hf_slim.slim_everything  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'slim_everything' from 'hf_slim'"):
        from hf_slim import slim_everything  # noqa: F401
