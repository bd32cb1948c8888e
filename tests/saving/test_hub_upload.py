"""Uploads to a Hub on this machine: what arrives, and what is left here when it fails half way."""

import json

import pytest
from transformers import AutoModelForSequenceClassification

XET = {
    name: f"from huggingface_hub import constants\nconstants.HF_HUB_DISABLE_XET = {name == 'lfs'}\n"
    for name in ("lfs", "xet")
}
PUSH = """
import sys, time
from sparse_models import masked
from hf_slim import save_slimmed
time.sleep = lambda seconds: None  # between the attempts
try:
    save_slimmed(masked(), sys.argv[1], push_to_hub=True, {})
except RuntimeError as error:
    print(error)
"""
ALL = "repo_id='me/slim-bert', token='secret', private=True"


@pytest.fixture
def upload(hub, worker):
    """Runs a script, and gives what it printed."""

    def upload(folder, script, *, faults=None, large=lambda path: False, protocol="lfs", files=None):
        hub.faults, hub.large = faults or {}, large
        if files is not None:
            hub.add_repository("me/slim-bert", dict.fromkeys(files, b"old"))
        done = worker.run(XET[protocol] + script, folder)
        assert done.status == 0, done.stderr[-3000:]
        return done.stdout

    return upload


def operations(hub):
    """What the only commit adds and deletes."""
    (commit,) = (body for path, body in hub.calls if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()[1:]]
    names = {
        kind: {line["value"]["path"] for line in lines if line["key"] == kind} for kind in ("file", "deletedFile")
    }
    assert sum(map(len, names.values())) == len(lines)
    return names["file"], names["deletedFile"]


def test_push_to_hub_uploads_the_folder(upload, hub, tmp_path):
    assert upload(tmp_path / "slim", PUSH.format(ALL)) == ""
    create = next(json.loads(body) for path, body in hub.calls if path == "POST /api/repos/create")
    assert create["name"] == "slim-bert"
    assert create.get("visibility") == "private" or create.get("private") is True
    commit = next(body for path, body in hub.calls if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    assert lines[0]["value"]["summary"] == "Upload slim model"
    uploaded = {line["value"]["path"] for line in lines[1:]}
    assert uploaded == {path.name for path in (tmp_path / "slim").iterdir()}
    there = {path.name: path.read_bytes() for path in (tmp_path / "slim").iterdir()}
    assert hub.files("me/slim-bert") == there | {".gitattributes": b"*.safetensors filter=lfs\n"}


@pytest.mark.parametrize(
    ("faults", "reached"),
    [
        ({"/repos/create": 500}, "/repos/create"),
        ({"/preupload/": 500}, "/preupload/"),
        ({"/preupload/": "closed"}, "/preupload/"),
        ({"/lfs/objects/batch": 500}, "/lfs/objects/batch"),
        ({"/lfs/objects/batch": "closed"}, "/lfs/objects/batch"),
        ({}, "/xet-write-token/"),
        ({"/commit/": 500}, "/commit/"),
        ({"/commit/": "closed"}, "/commit/"),
    ],
)
def test_an_upload_that_fails_half_way(upload, hub, faults, reached, tmp_path):
    """The model is whole in the folder, and the error says where and how to go on."""
    protocol = next((protocol for protocol in ("lfs", "xet") if protocol in reached), None)
    large = {"model.safetensors"} if protocol else ()
    output = upload(
        tmp_path / "slim",
        PUSH.format(ALL),
        faults=faults,
        large=lambda path: path in large,
        protocol=protocol or "xet",
    )
    assert reached in hub.calls[-1][0]
    assert output.startswith("The upload to me/slim-bert failed: "), output
    assert output.endswith(
        f". The slim model is whole in {tmp_path}/slim: upload it with `hf upload me/slim-bert {tmp_path}/slim "
        "--private`, or save it again.\n"
    )
    assert "secret" not in output
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim", output_loading_info=True)
    assert not any(report.values())


def test_a_hub_that_is_not_there(upload, tmp_path):
    """Nothing listens at port 9."""
    elsewhere = "constants.ENDPOINT = 'http://127.0.0.1:9'\n"
    output = upload(tmp_path / "slim", elsewhere + PUSH.format(ALL))
    assert output.startswith("The upload to me/slim-bert failed: ") and "Connection refused" in output
    assert ".. " not in output
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")


CARD = {"README.md", "hf_slim_layers.svg", "slim_report.json"}
FILES = {*CARD, "config.json", "model.safetensors", "modeling_hf_slim.py"}
OTHERS = [".env", "data/rows.csv", "optimizer.pt", "training_args.bin", "checkpoint-3/model.safetensors", "notes.txt"]


def write_others(folder):
    for name in OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def test_only_what_was_saved_is_uploaded_and_takes_the_place_of_what_was_there(upload, hub, tmp_path):
    """In one commit, by the real client; a card of a repository named without its user gets the whole name."""
    write_others(tmp_path / "slim")
    replaced = {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "adapter_model.safetensors", "adapter_config.json"),
    }
    kept = {".gitattributes", "notes.md", "onnx/model.onnx", "checkpoint-1/model.safetensors", "tokenizer.json"}
    script = PUSH.format("repo_id='slim-bert'")
    assert upload(tmp_path / "slim", script, files={*replaced, *kept, "model.safetensors"}) == ""
    assert operations(hub) == (FILES, replaced)
    assert hub.files("me/slim-bert").keys() == FILES | kept
    assert all(hub.files("me/slim-bert")[name] == b"old" for name in kept)
    card = (tmp_path / "slim" / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("me/slim-bert")' in card and "# slim-bert\n" in card
    assert json.loads((tmp_path / "slim" / "slim_report.json").read_text())["name"] == "me/slim-bert"
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {
        *(FILES | {".env", "data", "optimizer.pt", "training_args.bin", "checkpoint-3", "notes.txt"})
    }
    assert "create_pr" not in next(path for path, _ in hub.calls if "/commit/" in path)


def test_the_command_for_an_upload_that_failed_names_only_what_was_saved(upload, tmp_path):
    write_others(tmp_path / "slim")
    script = PUSH.format("repo_id='me/slim-bert', revision='v2'")
    output = upload(tmp_path / "slim", script, faults={"/commit/": 500})
    assert output.endswith(
        f"upload it with `hf upload me/slim-bert {tmp_path}/slim --revision v2 --include README.md --include "
        "config.json --include hf_slim_layers.svg --include model.safetensors --include modeling_hf_slim.py --include "
        "slim_report.json`, or save it again.\n"
    )


CONTAINER = """
import sys, torch
from pathlib import Path
from sparse_models import Holder
from sparse_models import masked
from hf_slim import save_slimmed

class WithHead(Holder):
    def save_pretrained(self, folder):
        super().save_pretrained(folder)
        (Path(folder) / "1_Head").mkdir()
        torch.save({}, f"{folder}/1_Head/pytorch_model.bin")

save_slimmed(WithHead(masked()), sys.argv[1], push_to_hub=True, repo_id="me/slim-bert")
"""


def test_files_of_containers_are_uploaded(upload, hub, tmp_path):
    (tmp_path / "slim" / "1_Head").mkdir(parents=True)
    (tmp_path / "slim" / "1_Head" / "notes.bin").write_text("mine")
    there = {"1_Head/model.safetensors", "inner/adapter_config.json", "2_Other/model.safetensors"}
    upload(tmp_path / "slim", CONTAINER, files=there)
    inner = {f"inner/{name}" for name in FILES - CARD}
    assert operations(hub) == (
        {*CARD, "1_Head/pytorch_model.bin", *inner},
        {"1_Head/model.safetensors", "inner/adapter_config.json"},
    )
    assert (tmp_path / "slim" / "1_Head" / "notes.bin").read_text() == "mine"


FIELDS = """
import sys
from sparse_models import masked
from transformers import Trainer, TrainingArguments
from hf_slim import save_slimmed
args = TrainingArguments(
    sys.argv[1] + "-out", report_to="none", hub_model_id="me/named", hub_token="theirs", hub_private_repo=True,
    hub_revision="v2",
)
save_slimmed(Trainer(masked(), args), sys.argv[1], push_to_hub=True, {})
"""


@pytest.mark.parametrize(
    ("keywords", "name", "token", "private", "where"),
    [
        ("", "named", "theirs", True, "/commit/v2"),
        ("token='mine', private=False, revision='v3'", "named", "mine", False, "/commit/v3"),
        ("repo_id='other', token=None, create_pr=True", "other", "theirs", True, "/commit/main?create_pr=1"),
    ],
)
def test_the_hub_fields_of_the_arguments_count_where_the_caller_gives_none(
    upload, hub, keywords, name, token, private, where, tmp_path
):
    upload(tmp_path / "slim", FIELDS.format(keywords))
    create = next(json.loads(body) for path, body in hub.calls if path == "POST /api/repos/create")
    assert create["name"] == name
    assert (create.get("visibility") == "private" or create.get("private") is True) is private
    assert {sent for path, sent in hub.tokens.items() if "/repos/create" in path or "/models/" in path} == {
        f"Bearer {token}"
    }
    assert next(path for path, _ in hub.calls if "/commit/" in path).endswith(where)
    branch = where.removeprefix("/commit/")
    made = [path.rpartition("/")[2] for path, _ in hub.calls if "/branch/" in path]
    assert made == ([branch] if branch.startswith("v") else [])
    assert f'from_pretrained("me/{name}")' in (tmp_path / "slim" / "README.md").read_text()


STOCK_PUSHES = {
    "model.push_to_hub": "model_slim(ragged()).push_to_hub('me/slim-bert', token='secret')",
    "save_pretrained": "model_slim(ragged()).save_pretrained(folder, push_to_hub=True, repo_id='me/slim-bert', "
    "token='secret')",
    "Trainer.push_to_hub": "Trainer(model_slim(ragged()), TrainingArguments(folder, hub_token='secret', "
    "hub_model_id='me/slim-bert', report_to='none', use_cpu=True)).push_to_hub()",
}
STOCK_PUSH = """
import sys
from conftest import build, half_masks
from transformers import Trainer, TrainingArguments
from hf_slim import find_structures, model_slim
from hf_slim.compaction.zeros import zero_units

def ragged():
    model = build("bert")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    return model

folder = sys.argv[1]
"""


@pytest.mark.parametrize("how", STOCK_PUSHES)
def test_stock_pushes_are_portable(upload, hub, how, tmp_path):
    """They upload the resizing file, and an `auto_map` that names it."""
    upload(tmp_path / "slim", STOCK_PUSH + STOCK_PUSHES[how])
    files = hub.files("me/slim-bert")
    assert {"config.json", "model.safetensors", "modeling_hf_slim.py"} <= files.keys()
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModel"] == "modeling_hf_slim.BertModel" and "hf_slim" in config
