"""Checkpoints that a training resumes from: cut-off and damaged ones, other settings, other lengths of training."""

import ast
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build
from trainers import HALF, Mine, kept, make_data, make_trainer, slim_callback, weights
from transformers import Trainer, TrainingArguments

import hf_slim
from hf_slim import SlimConfig, SlimTrainerCallback, find_structures, parse_auto_slim_config
from hf_slim.training.checkpoints import find_whole_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 4, "use_cpu": True}
FFN = "bert.encoder.layer.0.output.dense"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with checkpoints at 4 (in the middle of the schedule), 8 and 12 (after it), and its last weights."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(build("bert"), folder, **SAVING)
    trainer.train()
    return folder, weights(trainer.model), kept(trainer)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def resume(run, checkpoint=4, model=None, **settings):
    trainer = make_trainer(model or build("bert", seed=5), run, **{**SAVING, **settings})
    where = checkpoint if isinstance(checkpoint, bool) else str(run / f"checkpoint-{checkpoint}")
    trainer.train(resume_from_checkpoint=where)
    return trainer


def ends_like(trainer, trained):
    _, expected, masks = trained
    actual = trainer.model.state_dict()
    return all(torch.equal(actual[name], expected[name]) for name in expected) and kept(trainer) == masks


def read_state(run, step):
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())


def change_state(run, change, step=4):
    """Change what the checkpoint holds of the callback."""
    state = read_state(run, step)
    change(state["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["saved"])
    (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def collect_warnings(monkeypatch, module):
    messages = []
    monkeypatch.setattr(f"hf_slim.training.{module}.logger.warning", messages.append)
    return messages


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: cut(p, 0), cut, lambda p: cut(p, 0.999)])
def test_a_checkpoint_that_is_cut_off_is_skipped(damage, run, trained, monkeypatch):
    damage(run / "checkpoint-12" / "trainer_state.json")
    messages = collect_warnings(monkeypatch, "checkpoints")
    assert ends_like(resume(run, True), trained)
    assert messages == [
        f"{run}/checkpoint-12 was not written to its end, so training resumes from {run}/checkpoint-8."
    ]


def test_a_whole_checkpoint_is_not_skipped(run, trained, monkeypatch):
    messages = collect_warnings(monkeypatch, "checkpoints")
    shutil.rmtree(run / "checkpoint-12")
    assert ends_like(resume(run, True), trained)
    assert messages == []


def test_only_cut_off_checkpoints(run):
    for step in (4, 8, 12):
        cut(run / f"checkpoint-{step}" / "trainer_state.json")
    with pytest.raises(
        ValueError,
        match=rf"No valid checkpoint found in output directory \({run}\): {run}/checkpoint-12/trainer_state.json is "
        "missing or cut off. Train from the start.",
    ):
        resume(run, True)


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


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=rf"No valid checkpoint found in output directory \({tmp_path}\). Train from"):
        resume(tmp_path, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"garbage\n}\n", "Expecting value: line 1"),
        (b"\xff\xfe{\n}\n", "'utf-8' codec can't decode"),
        (b"[\n]\n{\n}\n", "Extra data: line 3"),
        (b"[1]", "must be a mapping, not list"),
        (b'{"colour": 1\n}\n', "unexpected keyword argument 'colour'"),
        (b"{\n}\n", "it says that 0 steps are done"),
        (b'{"global_step": "4"\n}\n', "it says that '4' steps are done"),
        (b'{"global_step": 4, "stateful_callbacks": ["SlimTrainerCallback"]\n}\n', ""),
        (b'{"global_step": 4, "stateful_callbacks": {"SlimTrainerCallback": [1]}\n}\n', "it has no settings"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_damaged_trainer_state(text, problem, last, run):
    path = run / "checkpoint-12" / "trainer_state.json"
    path.write_bytes(text)
    if last and not text.endswith(b"\n}\n"):
        pytest.skip("it counts as cut off")
    with pytest.raises(ValueError, match=f"{path} is damaged: .*{problem}.* Resume from another checkpoint, or del"):
        resume(run, True if last else 12)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        *((lambda saved, key=key: saved.pop(key), f"it has no {key}") for key in ("settings", "steps", "events")),
        *((lambda saved, key=key: saved.pop(key), f"it has no {key}") for key in ("dropped", "scores")),
        (lambda saved: saved.update(settings="half"), "it has no settings"),
        (lambda saved: saved.update(steps=[["2"]]), "its steps are not lists of numbers"),
        (lambda saved: saved.update(steps=[[], []]), "its steps are not lists of numbers"),
        (lambda saved: saved.update(events=[True, 1]), "its events are not numbers"),
        (lambda saved: saved["dropped"].update({FFN: 3}), "its dropped units or scores are not lists"),
        (lambda saved: saved["scores"].update({FFN: None}), "its dropped units or scores are not lists"),
        (lambda saved: saved["scores"].update({FFN: ["1"] * 64}), "its scores are not numbers"),
        (lambda saved: saved["dropped"].update({FFN: [64]}), f"the dropped units of {FFN} are not among its 64 units"),
        (lambda saved: saved["dropped"].update({FFN: [-1]}), f"the dropped units of {FFN} are not among its 64"),
        (lambda saved: saved["dropped"].update({FFN: ["1"]}), f"the dropped units of {FFN} are not among its 64"),
        (lambda saved: saved["dropped"].pop(FFN), f"'{FFN}' is in only one of the state and the model"),
        (lambda saved: saved["dropped"].update(other=[]), "'other' is in only one of the state and the model"),
        (lambda saved: saved["scores"][FFN].__setitem__(3, math.nan), f"the scores of {FFN} are not 64 finite"),
        (lambda saved: saved["scores"][FFN].__setitem__(3, math.inf), f"the scores of {FFN} are not 64 finite"),
        (lambda saved: saved["scores"][FFN].__setitem__(3, 10**400), f"the scores of {FFN} are not 64 finite"),
        (lambda saved: saved["scores"][FFN].pop(), f"the scores of {FFN} are not 64 finite numbers"),
        (lambda saved: saved["scores"].update(other=[1.0]), "the scores of other are not None finite numbers"),
        (lambda saved: saved.update(events=[99, 0]), r"\[99, 0\] pruning steps of 2 schedules are said to be done"),
        (lambda saved: saved.update(events=[-1, 0]), r"\[-1, 0\] pruning steps of 2 schedules are said to be done"),
        (lambda saved: saved.update(events=[1]), r"\[1\] pruning steps of 2 schedules are said to be done"),
    ],
)
def test_a_damaged_slimming_state(change, problem, run):
    change_state(run, change)
    with pytest.raises(ValueError, match=f"The slimming state does not fit or is damaged: {problem}"):
        resume(run)


def test_the_state_of_another_model(run):
    (run / "checkpoint-4" / "optimizer.pt").unlink()  # torch refuses that first, if it is there
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.2.\S+' is in only one of the state and the model"):
        resume(run, model=build("bert", num_hidden_layers=3))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(name, share, run):
    cut(run / "checkpoint-12" / name, share)
    for where in (True, 12):
        with pytest.raises(ValueError, match=f"{run}/checkpoint-12/{name} is damaged: .*. Resume from another"):
            resume(run, where)


def split(checkpoint):
    """Write the weights of a checkpoint in shards."""
    model = type(build("bert")).from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="60KB")
    return sorted(checkpoint.glob("model-*.safetensors"))


def test_resuming_from_shards(run, trained):
    assert len(split(run / "checkpoint-4")) > 1
    assert ends_like(resume(run), trained)


def test_a_missing_shard_is_named(run):
    shard = split(run / "checkpoint-4")[0]
    shard.unlink()
    index = f"{run}/checkpoint-4/model.safetensors.index.json"
    with pytest.raises(ValueError, match=f"{index} is damaged: it names {shard.name}, which is not there"):
        resume(run)


def test_a_damaged_shard_is_named(run):
    shard = split(run / "checkpoint-4")[-1]
    cut(shard)
    with pytest.raises(ValueError, match=f"{shard} is damaged: "):
        resume(run)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(text, run):
    split(run / "checkpoint-4")
    path = run / "checkpoint-4" / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is damaged: "):
        resume(run)


def test_weights_that_are_gone(run):
    (run / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"Can't find a valid checkpoint at {run}/checkpoint-4"):
        resume(run)


def test_other_settings_are_refused(run):
    difference = "ffn2_sparsity=0.5 there, 0.25 here, slim_scope='global' there, 'local' here. Resume with"
    with pytest.raises(ValueError, match=f"The checkpoint was made with other slim settings: {difference}"):
        resume(run, ffn2_sparsity=0.25, slim_scope="local")


def entries(**changes):
    settings = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "start_step": 2, "end_step": 8, **changes}
    return parse_auto_slim_config(build("bert"), **settings)


def test_other_entries_are_refused(tmp_path):
    make_trainer(build("bert"), tmp_path, config=entries(), **SAVING).train()
    resume(tmp_path, config=entries())
    message = "other slim settings: entry 1: target_sparsity=0.5 there, 0.25 here. Resume"
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, config=entries(mha_sparsity=0.25))
    message = "settings: entry 0: end_step=8 there, 9 here; entry 1: end_step=8 there, 9 here. Resume"
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, config=entries(end_step=9))
    with pytest.raises(ValueError, match="other slim settings: 2 entries there, 1 here. Resume"):
        resume(tmp_path, config=entries(mha_sparsity=0.0))


def test_without_state_the_schedule_starts_there(tmp_path, monkeypatch):
    """Fractions count of the 8 steps that remain: from step 4 + 2 to step 4 + 6."""
    plain = make_trainer(build("bert"), tmp_path, **SAVING, ffn2_sparsity=0.0, mha_sparsity=0.0)
    plain.remove_callback(SlimTrainerCallback)
    plain.train()
    assert "SlimTrainerCallback" not in read_state(tmp_path, 4)["stateful_callbacks"]
    messages = collect_warnings(monkeypatch, "callback")
    resumed = resume(tmp_path, slim_start=0.25, slim_end=0.75)
    assert messages == [
        "The checkpoint of step 4 holds no slimming state: the schedule starts there, with nothing dropped so far and "
        "fractions counted of the steps that remain."
    ]
    for plan in slim_callback(resumed).slimming.plan.targets:
        assert (plan.schedule.steps[0], plan.schedule.steps[-1]) == (6, 10)
    logged = {e["step"]: e["ffn2_sparsity"] for e in resumed.state.log_history if "ffn2_sparsity" in e}
    assert (logged[5], logged[10], logged[12]) == (0, 0.5, 0.5)
    assert slim_callback(resumed).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_more_steps_keep_the_pruning_steps(tmp_path):
    fractions = {"slim_start": 0.25, "slim_end": 0.75}
    make_trainer(build("bert"), tmp_path, **SAVING, **fractions).train()
    resumed = resume(tmp_path, max_steps=24, **fractions)
    steps = [plan.schedule.steps for plan in slim_callback(resumed).slimming.plan.targets]
    assert [list(placed) for placed in steps] == read_state(tmp_path, 4)["stateful_callbacks"]["SlimTrainerCallback"][
        "attributes"
    ]["saved"]["steps"]
    assert {(placed[0], placed[-1]) for placed in steps} == {(3, 9)}
    assert resumed.state.global_step == 24
    assert slim_callback(resumed).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_too_few_steps_are_refused(tmp_path):
    fractions = {"slim_start": 0.25, "slim_end": 0.75}
    make_trainer(build("bert"), tmp_path, **SAVING, **fractions).train()
    with pytest.raises(ValueError, match="do not fit 2 schedules in a training of 6 steps: resume with the number of"):
        resume(tmp_path, max_steps=6, **fractions)


def test_a_trainer_without_the_callback_is_left_alone(tmp_path, monkeypatch):
    """It fails as it does without hf_slim: on the last checkpoint, by the error of the file's reader."""
    model = build("bert")
    settings = {**SAVING, "max_steps": 8, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=make_data(model)).train()
    cut(tmp_path / "checkpoint-8" / "trainer_state.json")
    messages = collect_warnings(monkeypatch, "checkpoints")
    plain = Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=make_data(model))
    with pytest.raises(json.JSONDecodeError):
        plain.train(resume_from_checkpoint=True)
    assert messages == []
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert plain.state.global_step == 8


def test_the_state_is_plain_json_and_drops_its_scores(run):
    names = {s.name: s.units for s in find_structures(build("bert")).structures}
    for step in (4, 8, 12):
        saved = read_state(run, step)["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["saved"]
        assert saved["settings"] == {**json.loads(json.dumps(vars(SlimConfig(**HALF, slim_live=False))))}
        assert {name: len(scores) for name, scores in saved["scores"].items()} == (names if step == 4 else {})
        assert all(math.isfinite(value) for values in saved["scores"].values() for value in values)
        assert saved["dropped"].keys() == names.keys()
    assert sum(map(len, saved["dropped"].values())) == 64 + 4


def test_hf_slim_unpickles_nothing():
    """No code of the package names pickle or a loader that may use it, in whatever way it is called."""
    found = []
    for path in sorted(Path(hf_slim.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            names += [node.arg or ""] if isinstance(node, ast.keyword) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            for name in names:
                if set(name.split(".")) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
                    found.append((path.name, node.lineno, name))
                if name in ("torch.load", "allow_pickle", "weights_only", "torch.hub", "numpy.load", "np.load"):
                    found.append((path.name, node.lineno, name))
    assert found == []


def train_as(cls, folder, resume_from_checkpoint=None, **settings):
    """A whole training, or the rest of one, with a callback of a class."""
    trainer = make_trainer(build("bert"), folder, **{**SAVING, **settings})
    trainer.remove_callback(SlimTrainerCallback)
    trainer.add_callback(cls())
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("classes", [(Mine, Mine), (SlimTrainerCallback, Mine), (Mine, SlimTrainerCallback)])
def test_a_subclass_resumes(classes, live, tmp_path):
    """Bit-equal to the training that was not interrupted, with the state of one callback in its checkpoints."""
    first, second = classes
    whole = train_as(first, tmp_path, slim_live=live)
    resumed = train_as(second, tmp_path, str(tmp_path / "checkpoint-4"), slim_live=live)
    assert ends_like(resumed, (None, weights(whole.model), kept(whole)))
    states = read_state(tmp_path, 12)["stateful_callbacks"]
    assert [name for name in states if name != "TrainerControl"] == [second.__name__]
    with pytest.raises(ValueError, match="other slim settings: slim_scope='global' there, 'local' here"):
        train_as(second, tmp_path, True, slim_live=live, slim_scope="local")


def test_a_damaged_state_of_a_subclass_is_seen(tmp_path):
    train_as(Mine, tmp_path)
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["Mine"]["attributes"] = 3
    path.write_text(json.dumps(state, indent=2) + "\n")
    with pytest.raises(ValueError, match="does not fit or is damaged: it has no settings. Resume from another"):
        train_as(Mine, tmp_path, str(path.parent))


def test_two_callbacks_are_refused_where_training_resumes(tmp_path):
    train_as(SlimTrainerCallback, tmp_path)
    trainer = make_trainer(build("bert"), tmp_path, **SAVING)
    trainer.add_callback(Mine())
    with pytest.raises(ValueError, match="more than one SlimTrainerCallback"):
        trainer.train(resume_from_checkpoint=True)


def test_a_process_that_did_not_write_its_part_is_seen_with_a_subclass(tmp_path):
    train_as(Mine, tmp_path)
    path = tmp_path / "checkpoint-12" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["Mine"]["attributes"]["processes"] = 2
    path.write_text(json.dumps(state, indent=2) + "\n")
    assert find_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
