"""A checkpoint of several processes, and what the remote code may do."""

import ast
import json

import pytest
import torch
from conftest import build
from test_callback import make_trainer

from hf_slim import find_structures, save_slimmed
from hf_slim.checkpoints import find_whole_checkpoint
from hf_slim.masking import zero_units


def test_a_process_that_did_not_write_its_part_is_seen(tmp_path):
    make_trainer(build("bert"), tmp_path, save_strategy="steps", save_steps=5).train()
    path = tmp_path / "checkpoint-12" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["processes"] = 2
    path.write_text(json.dumps(state, indent=2) + "\n")
    assert find_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    for rank in (0, 1):
        torch.save({}, path.with_name(f"rng_state_{rank}.pth"))
    assert find_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_the_remote_code_only_resizes(family, tmp_path):
    model = build(family)
    structures = find_structures(model).structures
    masks = {s.name: torch.arange(s.units) < s.units // 2 + n // 2 % 2 for n, s in enumerate(structures)}
    zero_units(model, structures, masks)
    save_slimmed(model, tmp_path)
    tree = ast.parse((tmp_path / "modeling_hf_slim.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "exec", "eval", "compile", "__import__", "input")
    assert imported <= {"__future__", "torch", "transformers", "typing"}
    for node in tree.body:
        assert isinstance(
            node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef, ast.Expr)
        )
        assert not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant)
