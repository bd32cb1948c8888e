"""From a training to a repository of a Hub on this machine and back, with hf_slim and without it."""

import pytest
from conftest import build
from huggingface_hub import ModelCard

SAVE = """
import sys, time
from sparse_models import masked
from hf_slim import save_slimmed
time.sleep = lambda seconds: None  # between the attempts
try:
    save_slimmed(masked({model}), sys.argv[1], push_to_hub=True, {keywords})
except RuntimeError as error:
    print(error)
"""
TRAIN = """
import sys
from conftest import build
from transformers import Trainer
from hf_slim import SlimTrainerCallback, SlimTrainingArguments
args = SlimTrainingArguments(
    sys.argv[1], max_steps=6, slim_end=0.5, slim_round_to=1, ffn2_sparsity=0.5, mha_sparsity=0.5, use_cpu=True,
    report_to="none", disable_tqdm=True, hub_model_id="me/trained", hub_token="secret", hub_private_repo=True,
    hub_revision=None, save_strategy="no",
)
data = [{"input_ids": [5 + i, 6, 7], "labels": i % 2} for i in range(16)]
trainer = Trainer(build("bert"), args, train_dataset=data, callbacks=[SlimTrainerCallback()])
trainer.train()
trainer.push_to_hub()
print(sum(p.numel() for p in trainer.model.parameters()))
"""
LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification
name, token, revision = sys.argv[1:]
try:
    import hf_slim
    keywords = {}
except ImportError:
    keywords = {"trust_remote_code": True}
try:
    model = AutoModelForSequenceClassification.from_pretrained(
        name, token=token or None, revision=revision or "main", **keywords
    )
except OSError as error:
    print(type(error).__name__, str(error).partition("\\n")[0])
else:
    with torch.no_grad():
        print(sum(p.numel() for p in model.parameters()))
        print(type(model).__module__.rpartition(".")[2], model(torch.arange(5, 12)[None]).logits.tolist())
"""
FROM_BASE = """
import sys
from conftest import half_masks
from huggingface_hub import constants
from transformers import AutoModelForSequenceClassification
from hf_slim import find_structures, save_slimmed
from hf_slim.compaction.zeros import zero_units
from hf_slim.saving.base_card import _fetch_card
model = AutoModelForSequenceClassification.from_pretrained("me/base")
structures = find_structures(model).structures
zero_units(model, structures, half_masks(structures))
for folder, offline in (("one", False), ("two", True)):
    constants.HF_HUB_OFFLINE = offline
    _fetch_card.cache_clear()
    save_slimmed(model, f"{sys.argv[1]}/{folder}", verify=False)
"""
EXPECTED = """
import torch
from sparse_models import masked
model = masked({}).eval()
with torch.no_grad():
    print(model(torch.arange(5, 12)[None]).logits.tolist())
"""


@pytest.fixture
def run(worker):
    """Runs a script and gives what it printed."""

    def run(script, *arguments, **keywords):
        done = worker.run(script, *arguments, **keywords)
        assert done.status == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def load(run, hub):
    """Loads a repository, with hf_slim or without it: what it computes, and which files were fetched."""

    def load(name, token="", revision="", *, library=True):
        hub.calls.clear()
        environment = {"HF_TOKEN": ""}
        printed = run(LOAD, name, token, revision, library=library, environment=environment)
        fetched = {call.rpartition("/")[2] for call in hub.asked("GET /") if "/resolve/" in call}
        return printed.splitlines(), fetched

    return load


def near(text, expected):
    """Whether logits are those of the masked model."""
    (one,), (other,) = eval(text), eval(expected)
    return one == pytest.approx(other, abs=1e-5)


def test_a_private_model_comes_back_with_the_library_and_without_it(run, load, hub, tmp_path):
    keywords = "repo_id='me/slim-bert', token='secret', private=True"
    assert run(SAVE.format(model="", keywords=keywords), tmp_path / "slim") == ""
    expected = run(EXPECTED.format(""))
    for library, module in ((True, "modeling_bert"), (False, "modeling_hf_slim")):
        (size, printed), fetched = load("me/slim-bert", "secret", library=library)
        name, _, computed = printed.partition(" ")
        assert (int(size), name) == (29_538, module)
        assert near(computed, expected)
        # The second time what lies in the cache is what comes.
        assert fetched == ({"config.json", "model.safetensors"} if library else {"modeling_hf_slim.py"})
    for token in ("", "visitor"):
        (refused,), fetched = load("me/slim-bert", token)
        assert refused.startswith("OSError me/slim-bert is not a local folder") and not fetched


def test_what_a_trainer_pushes_comes_back(run, load, hub, tmp_path):
    size = run(TRAIN, tmp_path / "out").splitlines()[-1]
    assert hub.repositories["me/trained"].private and int(size) < 37_890
    for library in (True, False):
        assert load("me/trained", "theirs", library=library)[0][0] == size


def test_what_a_trainer_pushes_takes_the_place_of_a_slim_model(run, hub, tmp_path):
    """What `save_slimmed` left is of other weights: on the Hub and in the trainer's own folder."""
    stale = {"slim_report.json": b"old", "hf_slim_layers.svg": b"old"}
    hub.add_repository("me/trained", stale | {"notes.md": b"theirs"}, private=True)
    (tmp_path / "out").mkdir()
    for name, content in stale.items():
        (tmp_path / "out" / name).write_bytes(content)
    run(TRAIN, tmp_path / "out")
    files = hub.files("me/trained")
    assert "model.safetensors" in files and files["notes.md"] == b"theirs" and not files.keys() & stale.keys()
    assert len(hub.repositories["me/trained"].branches["main"]) == 2  # in the commit that brings the new ones
    assert all((tmp_path / "out" / name).read_bytes() == b"old" for name in stale)


def test_a_revision_is_apart_from_the_main_branch(run, load, hub, tmp_path):
    keywords = "repo_id='me/slim-bert'"
    run(SAVE.format(model="", keywords=keywords), tmp_path / "one")
    main = hub.files("me/slim-bert")
    run(SAVE.format(model="seed=7", keywords=f"{keywords}, revision='v2'"), tmp_path / "two")
    assert hub.files("me/slim-bert") == main
    for revision, model in (("main", ""), ("v2", "seed=7")):
        (_, printed), _ = load("me/slim-bert", revision=revision, library=False)
        assert near(printed.partition(" ")[2], run(EXPECTED.format(model)))


def test_a_pull_request_waits_beside_the_main_branch(run, load, hub, tmp_path):
    """Whoever may read a repository may open one."""
    hub.add_repository("me/slim-bert", {"pytorch_model.bin": b"old", "notes.md": b"theirs"})
    keywords = "repo_id='me/slim-bert', token='visitor', create_pr=True"
    assert run(SAVE.format(model="", keywords=keywords), tmp_path / "slim") == ""
    assert hub.files("me/slim-bert") == {"pytorch_model.bin": b"old", "notes.md": b"theirs"}
    assert hub.files("me/slim-bert", "refs/pr/1").keys() & {"pytorch_model.bin", "notes.md"} == {"notes.md"}
    for library in (True, False):
        (_, printed), _ = load("me/slim-bert", revision="refs/pr/1", library=library)
        assert near(printed.partition(" ")[2], run(EXPECTED.format("")))


def test_a_token_without_rights(run, hub, tmp_path):
    hub.add_repository("me/slim-bert", {"notes.md": b"theirs"})
    output = run(SAVE.format(model="", keywords="repo_id='me/slim-bert', token='visitor'"), tmp_path / "slim")
    assert output.startswith("The upload to me/slim-bert failed: ") and "Forbidden" in output
    assert hub.files("me/slim-bert") == {"notes.md": b"theirs"}
    assert (tmp_path / "slim" / "model.safetensors").is_file()


def test_an_upload_that_was_cut_off_is_taken_up_again(run, load, hub, tmp_path):
    """What has arrived is not sent again: neither when a file was cut off, nor when only the commit was missing."""
    save = SAVE.format(model="", keywords="repo_id='me/slim-bert', max_shard_size='50KB'")
    hub.puts = 1
    assert run(save, tmp_path / "slim").startswith("The upload to me/slim-bert failed: ")
    assert len(hub.objects) == 1 and hub.files("me/slim-bert").keys() == {".gitattributes"}

    (arrived,) = hub.objects
    hub.calls.clear()
    hub.puts, hub.faults = None, {"/commit/": 500}
    assert run(save, tmp_path / "slim").startswith("The upload to me/slim-bert failed: ")
    sent = {call.rpartition("/")[2] for call in hub.asked("PUT ")}
    assert sent == hub.objects.keys() - {arrived} and len(sent) >= 2

    hub.calls.clear()
    hub.faults = {}
    assert run(save, tmp_path / "slim") == ""
    assert hub.asked("/commit/") and not hub.asked("PUT ")
    (_, printed), _ = load("me/slim-bert")
    assert near(printed.partition(" ")[2], run(EXPECTED.format("")))


def test_the_license_comes_from_the_base_models_card_on_the_hub_or_in_the_cache(run, hub, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.add_repository("me/base", files | {"README.md": b"---\nlicense: mit\n---\n# Base\n"})
    run(FROM_BASE, tmp_path)
    for folder in ("one", "two"):
        data = ModelCard.load(tmp_path / folder / "README.md").data
        assert (data.base_model, data.base_model_relation, data.license) == ("me/base", "finetune", "mit")
    assert len(hub.asked("GET /me/base/resolve/main/README.md")) == 1
