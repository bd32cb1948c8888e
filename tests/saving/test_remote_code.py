"""The resizing file that a slim model may carry: what it can do at all, read off its syntax tree."""

import ast
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build, half_masks
from sparse_models import masked, masked_and_slim

from hf_slim import find_structures, modeling_hf_slim, save_slimmed
from hf_slim.compaction.zeros import zero_units

IMPORTS = {"ast", "functools", "inspect", "math", "textwrap", "torch", "torch.nn.modules.conv", "transformers"}
IMPORTS |= {"transformers.pytorch_utils", "typing"}
FORBIDDEN = {
    *("open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "globals", "locals", "delattr"),
    *("os", "sys", "subprocess", "socket", "pickle", "shutil", "pathlib", "importlib", "builtins", "ctypes", "load"),
    *("urllib", "requests", "httpx", "threading", "multiprocessing", "marshal", "tempfile", "__builtins__", "hub"),
}
NEEDED = {"_inferring": {"exec", "compile"}}
"""By whom, and what: methods of a class that is already imported are compiled again with -1 for a size."""


@pytest.fixture(scope="module")
def tree():
    return ast.parse(Path(modeling_hf_slim.__file__).read_text(encoding="utf-8"))


def names(tree):
    """Every name that code may reach something by: plain names, attributes, and names of imports."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_it_imports_torch_and_transformers_only(tree):
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found == IMPORTS
    assert all(node.level == 0 for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))


def test_it_does_nothing_when_it_is_imported(tree):
    for node in tree.body:
        if isinstance(node, ast.Expr):  # documentation
            assert isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        elif isinstance(node, ast.Assign):
            ast.literal_eval(node.value)
        else:
            assert isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)), ast.unparse(node)


def test_it_reaches_nothing_dangerous(tree):
    functions = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in functions:
        assert names(node) & FORBIDDEN == NEEDED.get(node.name, set()), node.name
    decorators = {ast.unparse(d) for node in functions for d in node.decorator_list}
    assert decorators == {"functools.cache"}


@pytest.mark.parametrize(
    "name", ["pickle", "Trainer", "BertConfig", "pipeline", "_anything", "NoSuchModel", "AutoModel"]
)
def test_it_makes_classes_of_models_alone(name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}', and transformers has no such model"):
        getattr(modeling_hf_slim, name)


def test_a_class_of_its_own_is_a_stock_one_that_resizes_itself():
    made = modeling_hf_slim.BertForMaskedLM
    assert made.__mro__[1] is transformers.BertForMaskedLM
    assert (made.__name__, made.__module__) == ("BertForMaskedLM", "hf_slim.modeling_hf_slim")
    assert pickle.loads(pickle.dumps(made)) is made is modeling_hf_slim.BertForMaskedLM


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit", "phi3", "longformer"])
def test_the_copy_is_the_file_itself(model_type, tmp_path):
    save_slimmed(masked_and_slim(model_type)[0], tmp_path)
    assert (tmp_path / "modeling_hf_slim.py").read_bytes() == Path(modeling_hf_slim.__file__).read_bytes()


def test_a_hostile_name_stays_a_string(tmp_path):
    """What a config says cannot become code."""
    model = masked("bert")
    model.config.name_or_path = model.config.finetuning_task = '"""\nimport os\n"""'
    save_slimmed(model, tmp_path)
    assert (tmp_path / "modeling_hf_slim.py").read_bytes() == Path(modeling_hf_slim.__file__).read_bytes()


@pytest.mark.parametrize(
    "architectures", [["os.system"], ["pipeline"], ["Trainer"], [3], None, ["BertModel", "print"]]
)
def test_architectures_are_data(architectures, tmp_path):
    """What a stranger's config.json names is never resolved but among the model classes that know the config."""
    save_slimmed(masked("bert"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = architectures
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = set(sys.modules)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForSequenceClassification"] == (
        "modeling_hf_slim.BertForSequenceClassification"
    )
    assert {name.partition(".")[0] for name in set(sys.modules) - before} <= {"transformers"}


def test_code_of_somebody_elses_is_left_as_it_is(tmp_path):
    model = build("bert")
    model.config.auto_map = {"AutoModel": "modeling_mine.Mine"}
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    save_slimmed(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_mine.Mine"}
    assert not (tmp_path / "modeling_hf_slim.py").exists()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.parameters(), type(loaded).from_pretrained(tmp_path).parameters(), strict=True)
    )
