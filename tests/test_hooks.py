"""The hooks are in force whenever hf_slim is imported, and importing it brings nothing heavy along."""

import copy
import importlib
import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import transformers
from conftest import build, half_masks

from hf_slim import find_structures, save_slimmed
from hf_slim.compaction.zeros import zero_units
from hf_slim.hooks import HOOKS, install_hooks

HEAVY = {"accelerate", "datasets", "evaluate", "numpy", "torch", "transformers"}

ORDERS = {
    "hf_slim, then transformers": "import hf_slim; from transformers import AutoModel, PreTrainedModel, Trainer",
    "transformers, then hf_slim": "import transformers.trainer; from transformers import AutoModel; import hf_slim",
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
found = {"early": sorted(name for name in sys.modules if name.startswith("hf_slim."))}
found["records"] = [cls.from_pretrained(folder / "slim").config.hf_slim for cls in (AutoModel, Own)]
found["shapes"] = [
    [list(layer.intermediate.dense.weight.shape) for layer in cls.from_pretrained(folder / "slim").encoder.layer]
    for cls in (AutoModel, Own)
]
try:
    AutoModel.from_pretrained(folder / "damaged")
except Exception as error:
    found["damaged"] = str(error)

from hf_slim.training.callback import SlimTrainerCallback
from hf_slim.arguments import SlimTrainingArguments

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

for name in hf_slim.hooks.HOOKS:
    importlib.reload(sys.modules[name])
importlib.reload(hf_slim.hooks)
importlib.reload(hf_slim)
found["depths"] = []
for module, name, method in (
    ("trainer", "Trainer", "train"),
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
    found["depths"].append(depth)
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
def used(request, folder: Path) -> dict:
    """What a fresh process sees that imports in one of the orders."""
    printed = run(ORDERS[request.param] + USE, folder, request.param)
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


def test_dense_models_and_plain_trainers_need_nothing_of_ours(used):
    assert used["early"] == ["hf_slim.hooks"]


def test_the_hooks_are_there_once_after_a_reload(used):
    assert used["depths"] == [1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("module", ["hf_slim", "hf_slim.cli.command"])
def test_importing_brings_nothing_heavy_along(module):
    loaded = run(f"import sys, {module}; dir(hf_slim); print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert "hf_slim" in loaded.split()
    assert HEAVY & set(loaded.split()) == set()


def test_the_usage_of_the_command_comes_without_anything_heavy():
    code = "import sys\nfrom hf_slim.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    printed = run(code)
    assert printed.startswith("usage: hf-slim")
    assert HEAVY & set(printed.splitlines()[-1].split()) == set()


def test_the_hooks_are_installed_once():
    def current():
        return (
            transformers.PreTrainedModel.post_init,
            transformers.PreTrainedModel.from_pretrained.__func__,
            transformers.PreTrainedModel.save_pretrained,
            transformers.PreTrainedConfig.save_pretrained,
            transformers.trainer_callback.CallbackHandler.on_log,
            transformers.Trainer.train,
            list(sys.meta_path),
        )

    installed = current()
    install_hooks()
    assert current() == installed


@pytest.mark.parametrize("name", HOOKS)
def test_a_hooked_module_of_transformers_keeps_its_spec_and_source(name):
    module = sys.modules[name]
    assert importlib.util.find_spec(name) is module.__spec__
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert inspect.getsource(module) == Path(module.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_hooked_functions_are_pickled_and_copied_by_name(copied):
    for function in (
        transformers.PreTrainedModel.post_init,
        transformers.Trainer.train,
        transformers.trainer_callback.CallbackHandler.on_log,
        transformers.BertModel.from_pretrained,
    ):
        assert copied(function) == function


@pytest.fixture
def hooked(tmp_path, monkeypatch) -> list[object]:
    """What the hook of a module `slowly_imported` was called with; the module can be imported."""
    (tmp_path / "slowly_imported.py").write_text("import time\nBEGUN = True\ntime.sleep(0.1)\nDONE = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    calls: list[object] = []
    monkeypatch.setitem(HOOKS, "slowly_imported", lambda module: calls.append((module, module.DONE)))
    yield calls
    sys.modules.pop("slowly_imported", None)


def test_a_module_is_hooked_at_the_end_of_its_import_and_of_a_reload(hooked):
    spec = importlib.util.find_spec("slowly_imported")
    assert spec.origin.endswith("slowly_imported.py") and spec.loader.is_package("slowly_imported") is False
    assert copy.copy(spec.loader).get_source("slowly_imported") == spec.loader.get_source("slowly_imported")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        spec.loader.nothing  # noqa: B018
    assert hooked == []
    module = importlib.import_module("slowly_imported")
    assert hooked == [(module, True)]
    assert inspect.getsource(module).startswith("import time\n")
    importlib.import_module("slowly_imported")
    assert hooked == [(module, True)]
    del module.DONE
    importlib.reload(module)
    assert hooked == [(module, True)] * 2


def test_a_module_that_is_there_is_hooked_at_once(hooked, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if type(finder).__name__ != "_Finder"])
    module = importlib.import_module("slowly_imported")
    assert hooked == []
    install_hooks()
    assert hooked == [(module, True)]


def test_a_module_that_another_thread_imports_is_hooked_when_it_is_done(hooked, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if type(finder).__name__ != "_Finder"])
    thread = threading.Thread(target=importlib.import_module, args=["slowly_imported"])
    thread.start()
    while not hasattr(sys.modules.get("slowly_imported"), "BEGUN"):
        pass
    install_hooks()
    thread.join()
    assert hooked == [(sys.modules["slowly_imported"], True)]


def test_many_threads_import_and_hook_once(hooked):
    threads = [threading.Thread(target=importlib.import_module, args=["slowly_imported"]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hooked == [(sys.modules["slowly_imported"], True)]


def test_a_module_that_fails_is_not_hooked(hooked, tmp_path):
    (tmp_path / "slowly_imported.py").write_text("raise OSError('broken')")
    with pytest.raises(OSError, match="broken"):
        importlib.import_module("slowly_imported")
    assert hooked == [] and "slowly_imported" not in sys.modules


def test_a_module_that_is_not_there_is_not_found(monkeypatch):
    monkeypatch.setitem(HOOKS, "no_such_module", print)
    assert importlib.util.find_spec("no_such_module") is None
    with pytest.raises(ModuleNotFoundError, match="^No module named 'no_such_module'$"):
        importlib.import_module("no_such_module")
