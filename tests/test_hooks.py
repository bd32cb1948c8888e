"""The hooks are in force whenever hf_slim is imported, and the command prints its usage before that."""

import copy
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import build, half_masks
from warm_python import WarmPython

from hf_slim import find_structures, save_slimmed
from hf_slim.compaction.zeros import zero_units
from hf_slim.hooks import install_hooks

HEAVY = {"accelerate", "datasets", "evaluate", "hf_slim", "numpy", "torch", "transformers"}

LATE = "transformers, then hf_slim"
ORDERS = {
    "hf_slim, then transformers": "import hf_slim; from transformers import AutoModel, PreTrainedModel, Trainer",
    LATE: "import sys; del sys.modules['hf_slim']; import transformers.trainer; import hf_slim",
    "hf_slim between": "from transformers import PreTrainedModel; import hf_slim; import transformers.trainer",
}

USE = """
import importlib, json, sys
from pathlib import Path
from transformers import AutoModel, AutoModelForSequenceClassification, BertModel, Trainer, TrainingArguments

class Own(BertModel):
    pass

folder = Path(sys.argv[1])
BertModel.from_pretrained(folder / "dense")
Trainer(AutoModelForSequenceClassification.from_pretrained(folder / "dense"), TrainingArguments(folder / "plain"))
found = {}
found["records"] = [cls.from_pretrained(folder / "slim").config.hf_slim for cls in (AutoModel, Own)]
found["shapes"] = [
    [list(layer.intermediate.dense.weight.shape) for layer in cls.from_pretrained(folder / "slim").encoder.layer]
    for cls in (AutoModel, Own)
]
try:
    AutoModel.from_pretrained(folder / "damaged")
except Exception as error:
    found["damaged"] = str(error)

from hf_slim import SlimTrainerCallback, SlimTrainingArguments

args = SlimTrainingArguments(
    folder / sys.argv[2], max_steps=2, logging_steps=1, save_steps=1, ffn2_sparsity=0.5, slim_start=1, slim_end=1,
    report_to="none", use_cpu=True, disable_tqdm=True,
)
model = AutoModelForSequenceClassification.from_pretrained(folder / "dense")
data = [{"input_ids": [5, 6, 7], "labels": 0}] * 16
trainer = Trainer(model, args, train_dataset=data, callbacks=[SlimTrainerCallback()])
trainer.train()
found["logged"] = [entry["ffn2_sparsity"] for entry in trainer.state.log_history if "loss" in entry]
(folder / sys.argv[2] / "checkpoint-1" / "optimizer.pt").write_bytes(b"cut off")
try:
    trainer.train(str(folder / sys.argv[2] / "checkpoint-1"))
except ValueError as error:
    found["resumed"] = str(error)

def depths():
    for module, name, method in (
        ("trainer", "Trainer", "train"),
        ("trainer_callback", "CallbackHandler", "on_init_end"),
        ("trainer_callback", "CallbackHandler", "on_train_begin"),
        ("trainer_callback", "CallbackHandler", "on_log"),
        ("modeling_utils", "PreTrainedModel", "post_init"),
        ("modeling_utils", "PreTrainedModel", "from_pretrained"),
        ("modeling_utils", "PreTrainedModel", "save_pretrained"),
        ("configuration_utils", "PreTrainedConfig", "save_pretrained"),
    ):
        function = getattr(getattr(sys.modules[f"transformers.{module}"], name), method)
        depth = 0
        while hasattr(function, "__wrapped__"):
            depth += function.__code__.co_filename == hf_slim.hooks.__file__
            function = function.__wrapped__
        yield depth

importlib.reload(hf_slim)
found["depths"] = [list(depths())]
importlib.reload(hf_slim.hooks)
importlib.reload(hf_slim)
found["depths"] += [list(depths())]
for module in ("configuration_utils", "modeling_utils", "trainer_callback", "trainer"):
    importlib.reload(sys.modules[f"transformers.{module}"])
importlib.reload(hf_slim)
found["depths"] += [list(depths())]
print(json.dumps(found))
"""


def run(code: str, *arguments: object) -> str:
    """What a fresh process prints that runs some code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense model, a slim one, and a damaged one."""
    folder = tmp_path_factory.mktemp("hooks")
    model = build("bert")
    model.save_pretrained(folder / "dense")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    save_slimmed(model, folder / "slim")
    (folder / "damaged").mkdir()
    for path in (folder / "slim").iterdir():
        data = path.read_bytes()
        (folder / "damaged" / path.name).write_bytes(data[:-9] if path.suffix == ".safetensors" else data)
    return folder


@pytest.fixture(scope="module", params=ORDERS)
def used(request, folder: Path, warm_python: WarmPython) -> dict:
    """What a process sees that imports in one of the orders; one that has imported transformers before is a fork."""
    code = ORDERS[request.param] + USE
    if request.param == LATE:
        done = warm_python.run(code, folder, request.param, library=False)
        assert done.status == 0, done.stderr[-6000:]
        printed = done.stdout
    else:
        printed = run(code, folder, request.param)
    return {"folder": folder, "order": request.param, **json.loads(printed.splitlines()[-1])}


def test_a_slim_folder_loads(used):
    record = json.loads((used["folder"] / "slim" / "config.json").read_text())["hf_slim"]
    assert record["shapes"]["encoder.layer.0.output.dense.weight"] == [32, 32]
    assert used["records"] == [record, record]
    assert used["shapes"] == [[[32, 32]] * 2] * 2


def test_a_damaged_file_is_named(used):
    assert used["damaged"].startswith(f"{used['folder']}/damaged/model.safetensors is damaged: ")


def test_a_trainer_logs_the_sparsity(used):
    assert used["logged"] == [0.5, 0.5]


def test_a_trainer_refuses_a_damaged_checkpoint(used):
    path = used["folder"] / used["order"] / "checkpoint-1" / "optimizer.pt"
    assert used["resumed"].startswith(f"{path} is damaged: it is cut off")


def test_the_hooks_are_there_once_after_a_reload(used):
    assert used["depths"] == [[1] * 8] * 3


def test_help_and_mistakes_are_answered_without_anything_heavy():
    folder = str(Path(__file__).parents[1] / "hf_slim" / "cli")  # from which it is installed as a package of its own
    helped, refused = ["--help", "push --help"], ["train", "compact", "run", "run --trian_file a.csv", "push a"]
    code = f"import sys\nsys.path.insert(0, {folder!r})\nfrom hf_slim_command import main\n"
    code += f"found = [main(words.split()) for words in {[*helped, *refused]}]\nprint(found, *sys.modules, sep='|')"
    *printed, last = run(code).splitlines()
    status, *loaded = last.split("|")
    assert status == str([0] * len(helped) + [2] * len(refused))
    assert "Usage: hf-slim [OPTIONS] COMMAND [ARGS]..." in printed
    assert "hf_slim_command" in loaded
    assert HEAVY & set(loaded) == set()


def test_the_console_script_is_the_command_that_is_quick():
    text = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    assert '"hf-slim = hf_slim_command:main"' in text and '{"hf_slim_command": "hf_slim/cli/hf_slim_command"}' in text


def test_python_runs_the_command_as_a_module(warm_python):
    command = ["python", "-m", "hf_slim.cli", "train"]
    done = subprocess.run(command, env=warm_python.environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "hf-slim: error: No such command 'train'. See `hf-slim --help`."


def test_the_hooks_are_installed_once():
    def current():
        return (
            transformers.PreTrainedModel.post_init,
            transformers.PreTrainedModel.from_pretrained.__func__,
            transformers.PreTrainedModel.save_pretrained,
            transformers.PreTrainedConfig.save_pretrained,
            transformers.trainer_callback.CallbackHandler.on_init_end,
            transformers.trainer_callback.CallbackHandler.on_train_begin,
            transformers.trainer_callback.CallbackHandler.on_log,
            transformers.Trainer.train,
        )

    installed = current()
    install_hooks()
    assert current() == installed


def test_hooked_functions_keep_their_signatures():
    parameters = inspect.signature(transformers.BertModel.from_pretrained).parameters
    assert list(parameters)[:2] == ["pretrained_model_name_or_path", "model_args"]
    assert list(inspect.signature(transformers.Trainer.train).parameters)[:2] == ["self", "resume_from_checkpoint"]


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_hooked_functions_are_pickled_and_copied_by_name(copied):
    for function in (
        transformers.PreTrainedModel.post_init,
        transformers.Trainer.train,
        transformers.trainer_callback.CallbackHandler.on_log,
        transformers.BertModel.from_pretrained,
    ):
        assert copied(function) == function
