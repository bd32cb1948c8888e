"""The remote-code file that a slim model may carry: what it can do at all, read off its syntax tree."""

import ast

import pytest
from test_live_use import masked_and_slim
from test_saving import masked

from hf_slim import save_slimmed

IMPORTS = {"transformers"}
WIDTHS_IMPORTS = {"ast", "functools", "inspect", "textwrap", "typing"}
"""The embedded widths module reads the source of an attention class, changes sizes in it, and compiles it again."""

FORBIDDEN = {
    *("open", "exec", "eval", "compile", "__import__", "input", "breakpoint", "globals", "locals", "delattr"),
    *("os", "sys", "subprocess", "socket", "pickle", "shutil", "pathlib", "importlib", "builtins", "ctypes", "torch"),
    *("urllib", "requests", "httpx", "threading", "multiprocessing", "marshal", "tempfile", "__builtins__"),
}
NEEDED = {"_inferring": {"exec", "compile"}}
"""By whom, and what: methods of a class that is already imported are compiled again with -1 for a size."""


def read(folder):
    return ast.parse((folder / "modeling_hf_slim.py").read_text())


def imported(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module)
    return found


def names(tree):
    """Every name that code may reach something by: plain names, attributes, and names of imports."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {part for name in imported(tree) for part in name.split(".")}


def is_literal(node):
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def check(tree, *, widths):
    assert imported(tree) == IMPORTS | (WIDTHS_IMPORTS if widths else set())
    functions = {}
    for number, node in enumerate(tree.body):
        if isinstance(node, ast.Expr):  # documentation
            assert isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        elif isinstance(node, ast.Assign):
            assert is_literal(node.value), ast.unparse(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            functions[node.name] = node
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom)), f"statement {number}: {ast.unparse(node)}"
    for name, node in functions.items():
        assert names(node) & FORBIDDEN == (NEEDED.get(name, set()) if widths else set()), name
        assert [ast.unparse(d) for d in node.decorator_list] == (["functools.cache"] if name == "_inferring" else [])
    for name, node in functions.items():
        if isinstance(node, ast.ClassDef) and name != "ConfigView":
            assert [ast.unparse(base) for base in node.bases] == [f"transformers.{name}"]
            (method,) = [part for part in node.body if not isinstance(part, ast.Expr)]
            assert [ast.unparse(line) for line in method.body] == [
                "super().__init__(config, *args, **kwargs)",
                "resize(self)",
            ]
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} >= {"resize"}
    constants = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert constants.keys() - {"_RESHAPING"} == {"SHAPES", "ATTRIBUTES", "RESHAPING"}
    assert bool(ast.literal_eval(constants["RESHAPING"])) == widths
    for shape in ast.literal_eval(constants["SHAPES"]).values():
        assert isinstance(shape, tuple) and all(type(size) is int for size in shape)


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "bart", "vit", "distilbert", "electra"])
def test_the_file_does_nothing_but_resize(family, tmp_path):
    save_slimmed(masked(family), tmp_path)
    check(read(tmp_path), widths=False)


@pytest.mark.parametrize(
    ("model_type", "widths"),
    [("phi3", False), ("olmo2", False), ("mpnet", False), ("swin", False), ("whisper", False), ("longformer", True)],
)
def test_the_file_of_other_layouts_does_nothing_but_resize(model_type, widths, tmp_path):
    save_slimmed(masked_and_slim(model_type)[0], tmp_path)
    check(read(tmp_path), widths=widths)


def test_a_hostile_name_stays_a_string(tmp_path):
    """What a config says cannot become code."""
    model = masked("bert")
    model.config.name_or_path = model.config.finetuning_task = '"""\nimport os\n"""'
    save_slimmed(model, tmp_path)
    check(read(tmp_path), widths=False)
