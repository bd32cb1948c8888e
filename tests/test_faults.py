"""What may go wrong from outside: kills, full disks, damaged files, failing uploads."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build, half_masks
from safetensors import SafetensorError
from test_callback import make_trainer, slim_callback
from transformers import AutoModelForSequenceClassification

import hf_slim
from hf_slim import SlimConfig, SlimTrainerCallback, find_structures, parse_auto_slim_config, save_slimmed
from hf_slim.checkpoints import find_whole_checkpoint
from hf_slim.folders import check_folder
from hf_slim.masking import zero_units

TESTS = Path(__file__).parent
SAVE = {"save_strategy": "steps", "save_steps": 5}
FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_faults import masked
from hf_slim import save_slimmed
model = masked(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save_slimmed(model, {folder!r}, verify=False)
except OSError as error:
    print(error)
"""


def masked(seed=0):
    model = build("bert", seed=seed)
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints at steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(build("bert"), folder, **SAVE).train()
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of it, to be damaged."""
    subprocess.run(["cp", "-r", f"{trained}/.", str(tmp_path)], check=True)
    return tmp_path


def resume(folder, checkpoint=True, **settings):
    trainer = make_trainer(build("bert"), folder, **{**SAVE, **settings})
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def change_state(folder, change):
    path = folder / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["saved"])
    path.write_text(json.dumps(state, indent=2) + "\n")


def test_a_training_killed_at_twenty_moments_ends_as_if_it_had_not_been():
    assert "20 of 20 end bit-equal, none lost a checkpoint" in run("faults.py", "--kills", "20")


def test_a_save_that_is_killed_leaves_the_old_folder_or_the_new_one_whole():
    assert "leave the old folder or the new one, whole" in run("faults.py", "--saves", "25")


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "slim"
    save_slimmed(masked(), folder)
    before = contents(folder)
    printed = run("-c", FULL_DISK.format(tests=str(TESTS), folder=str(folder)))
    assert f"The folder {folder} could not be written: " in printed
    assert "What was there before is unchanged." in printed
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_a_mount_point_is_refused():
    with pytest.raises(OSError, match="output_dir='/proc' is a mount point and cannot be replaced as a whole"):
        check_folder("/proc")


def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(PermissionError, match="output_dir='/proc/slim' cannot be written"):
        save_slimmed(masked(), "/proc/slim")


@pytest.mark.parametrize("how", ["missing", "empty", "half"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(how, copied, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_slim.checkpoints.logger.warning", messages.append)
    path = copied / "checkpoint-12" / "trainer_state.json"
    text = path.read_text()
    path.unlink()
    if how != "missing":
        path.write_text("" if how == "empty" else text[: len(text) // 2])
    trainer = resume(copied)
    assert messages == [
        f"{copied / 'checkpoint-12'} was not written to its end, so training resumes from {copied / 'checkpoint-10'}."
    ]
    assert trainer.state.global_step == 12


def test_without_a_whole_checkpoint_resuming_is_refused(copied):
    for step in (5, 10, 12):
        (copied / f"checkpoint-{step}" / "trainer_state.json").write_text("")
    with pytest.raises(
        ValueError, match=r"No valid checkpoint found .*checkpoint-12/trainer_state.json is missing or"
    ):
        resume(copied)


def test_a_process_that_did_not_write_its_part_is_seen(copied):
    path = copied / "checkpoint-12" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["processes"] = 2
    path.write_text(json.dumps(state, indent=2) + "\n")
    assert find_whole_checkpoint(copied) == str(copied / "checkpoint-10")
    for rank in (0, 1):
        torch.save({}, path.with_name(f"rng_state_{rank}.pth"))
    assert find_whole_checkpoint(copied) == str(copied / "checkpoint-12")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_is_cut_off_is_named(name, copied):
    path = copied / "checkpoint-5" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"checkpoint-5/{name} is damaged: .* Resume from another checkpoint"):
        resume(copied, str(copied / "checkpoint-5"))


def test_a_missing_shard_is_named(copied):
    folder = copied / "checkpoint-5"
    index = {"metadata": {}, "weight_map": {"classifier.bias": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "spare")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json is damaged: it names model-00001-of-00002.safetensors, which is"):
        resume(copied, str(folder))


def test_a_state_that_is_no_json_is_named(copied):
    (copied / "checkpoint-5" / "trainer_state.json").write_text("so\n}\n")
    with pytest.raises(ValueError, match="checkpoint-5/trainer_state.json is damaged: Expecting value"):
        resume(copied, str(copied / "checkpoint-5"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("scores"), "it has no scores"),
        (lambda saved: saved.update(steps=[["a"]]), "its steps are not lists of numbers"),
        (lambda saved: saved.update(events=[1]), "1. pruning steps of 2 schedules are said to be done"),
        (lambda saved: next(iter(saved["dropped"].values())).append(99), "are not among its 4 units"),
        (lambda saved: next(iter(saved["scores"].values())).pop(), "are not 4 finite numbers"),
        (lambda saved: saved["scores"].update(other=[1.0]), "the scores of other are not None finite numbers"),
        (lambda saved: next(iter(saved["scores"].values())).__setitem__(0, float("nan")), "are not 4 finite numbers"),
        (lambda saved: next(iter(saved["scores"].values())).__setitem__(0, "a"), "its scores are not numbers"),
        (lambda saved: saved["dropped"].update(other=[]), "'other' is in only one of the state and the model"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message, copied):
    change_state(copied, change)
    with pytest.raises(ValueError, match=f"(?s)trainer_state.json does not fit or is damaged: .*{message}"):
        resume(copied, str(copied / "checkpoint-5"))


def test_other_entries_are_named(tmp_path):
    def make(sparsity):
        model = build("bert")
        entries = parse_auto_slim_config(model, 0.5, sparsity, start_step=2, end_step=8, pruning_frequency=1)
        return make_trainer(model, tmp_path, config=entries, **SAVE)

    make(0.5).train()
    with pytest.raises(ValueError, match="other slim settings: entry 1: target_sparsity=0.5 there, 0.25 here"):
        make(0.25).train(resume_from_checkpoint=True)


def test_a_schedule_in_fractions_starts_at_a_checkpoint_without_state(tmp_path, monkeypatch):
    plain = make_trainer(build("bert"), tmp_path, **SAVE)
    plain.remove_callback(SlimTrainerCallback)
    plain.train()
    messages = []
    monkeypatch.setattr("hf_slim.callback.logger.warning", messages.append)
    fractions = {"slim_start": 0.2, "slim_end": 0.8, "slim_frequency": 0.2, "max_steps": 15}
    trainer = resume(tmp_path, str(tmp_path / "checkpoint-5"), **fractions)
    assert slim_callback(trainer).slimming.to_state()["steps"] == [[7, 9, 11, 13]] * 2
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert len(messages) == 1 and "step 5 holds no slimming state: the schedule starts there" in messages[0]


def test_a_longer_training_keeps_the_pruning_steps_and_a_shorter_one_is_refused(tmp_path):
    fractions = {"slim_start": 0.2, "slim_end": 0.75, "slim_frequency": 0.25}
    make_trainer(build("bert"), tmp_path, **SAVE, **fractions).train()
    trainer = resume(tmp_path, str(tmp_path / "checkpoint-5"), max_steps=24, **fractions)
    assert slim_callback(trainer).slimming.to_state()["steps"] == [[2, 5, 8, 9]] * 2
    with pytest.raises(ValueError, match="do not fit 2 schedules in a training of 8 steps"):
        resume(tmp_path, str(tmp_path / "checkpoint-5"), max_steps=8, **fractions)


def test_scores_are_not_kept_beyond_the_schedule(trained):
    state = json.loads((trained / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["saved"]["scores"] == {}


def test_a_trainer_without_the_callback_resumes_as_ever(copied):
    (copied / "checkpoint-12" / "trainer_state.json").unlink()
    trainer = make_trainer(build("bert"), copied, config=SlimConfig(), **SAVE)
    trainer.remove_callback(SlimTrainerCallback)
    with pytest.raises(FileNotFoundError):
        trainer.train(resume_from_checkpoint=True)


def test_a_damaged_weight_file_of_a_slim_model_is_named(tmp_path):
    save_slimmed(masked(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SafetensorError, match=f"{path} is damaged: .* Save or download the model again"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_nothing_is_pickled():
    for path in Path(hf_slim.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path


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
