"""Uploads to a Hub on this machine: what arrives, and what is left here when it fails half way."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, body))
        self.server.tokens[self.path] = self.headers["Authorization"]
        how = next((how for part, how in self.server.faults.items() if part in self.path), None)
        if how == "closed":  # in the middle of the answer
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"half')
            self.close_connection = True
            return
        if how is not None:
            self.send_error(how)
            return
        if self.path == "/api/repos/create":
            repo = json.loads(body)["name"].rpartition("/")[2]
            answer = {"url": f"{self.server.address}/me/{repo}", "name": f"me/{repo}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = self.server.mode
            answer = {
                "files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            }
        elif "/commit/" in self.path:
            self.server.commit([json.loads(line) for line in body.splitlines()[1:]])
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/me/x/commit/0"}
            answer["pullRequestUrl"] = f"{self.server.address}/me/x/discussions/1"
        else:
            answer = {}
        self.answer(answer)

    def do_GET(self):
        self.server.calls.append((self.path, b""))
        self.server.tokens[self.path] = self.headers["Authorization"]
        if "/xet-write-token/" in self.path:
            self.send_error(403)
            return
        if "/tree/" in self.path:
            self.answer([{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in sorted(self.server.files)])
            return
        self.answer({"name": "me", "type": "user", "sha": "0" * 40, "id": "me/x", "siblings": []})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class HubServer(ThreadingHTTPServer):
    """Keeps the files of one repository, what was asked for, and the tokens it was asked with."""

    def __init__(self, faults, mode, files):
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.faults, self.mode, self.files = faults, mode, set(files)
        self.calls, self.tokens = [], {}

    def commit(self, operations):
        for operation in operations:
            change = self.files.discard if operation["key"] == "deletedFile" else self.files.add
            change(operation["value"]["path"])


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


def upload(folder, script, *, faults=None, mode=lambda path: "regular", address=None, protocol="xet", files=()):
    """Run a script in a process of its own; what it printed, and the Hub as it is then."""
    server = HubServer(faults or {}, mode, files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "HF_ENDPOINT": address or server.address, "HF_HOME": str(folder.parent / "home")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    environment["HF_HUB_DISABLE_XET"] = "1" if protocol == "lfs" else "0"
    environment["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, server


def push(folder, faults=None, mode=lambda path: "regular", **options):
    """Save and upload; what it printed, and the requests that the Hub got."""
    output, server = upload(folder, PUSH.format(ALL), faults=faults, mode=mode, **options)
    return output, server.calls


def operations(server):
    """What the only commit adds and deletes."""
    (commit,) = (body for path, body in server.calls if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()[1:]]
    names = {
        kind: {line["value"]["path"] for line in lines if line["key"] == kind} for kind in ("file", "deletedFile")
    }
    assert sum(map(len, names.values())) == len(lines)
    return names["file"], names["deletedFile"]


def test_push_to_hub_uploads_the_folder(tmp_path):
    output, calls = push(tmp_path / "slim")
    assert output == ""
    create = next(json.loads(body) for path, body in calls if path == "/api/repos/create")
    assert create["name"] == "slim-bert"
    assert create.get("visibility") == "private" or create.get("private") is True
    commit = next(body for path, body in calls if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    assert lines[0]["value"]["summary"] == "Upload slim model"
    uploaded = {line["value"]["path"] for line in lines[1:]}
    assert uploaded == {path.name for path in (tmp_path / "slim").iterdir()}


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
def test_an_upload_that_fails_half_way(faults, reached, tmp_path):
    """The model is whole in the folder, and the error says where and how to go on."""
    protocol = next((protocol for protocol in ("lfs", "xet") if protocol in reached), None)
    large = {"model.safetensors": "lfs"} if protocol else {}
    output, calls = push(tmp_path / "slim", faults, lambda path: large.get(path, "regular"), protocol=protocol)
    assert reached in calls[-1][0]
    assert output.startswith("The upload to me/slim-bert failed: "), output
    assert output.endswith(
        f". The slim model is whole in {tmp_path}/slim: upload it with `hf upload me/slim-bert {tmp_path}/slim "
        "--private`, or save it again.\n"
    )
    assert "secret" not in output
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim", output_loading_info=True)
    assert not any(report.values())


def test_a_hub_that_is_not_there(tmp_path):
    """Nothing listens at port 9."""
    output, _ = push(tmp_path / "slim", address="http://127.0.0.1:9")
    assert output.startswith("The upload to me/slim-bert failed: ") and "Connection refused" in output
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")


FILES = {"README.md", "config.json", "model.safetensors", "modeling_hf_slim.py"}
OTHERS = [".env", "data/rows.csv", "optimizer.pt", "training_args.bin", "checkpoint-3/model.safetensors", "notes.txt"]


def write_others(folder):
    for name in OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def test_only_what_was_saved_is_uploaded_and_takes_the_place_of_what_was_there(tmp_path):
    """In one commit, by the real client; a card of a repository named without its user gets the whole name."""
    write_others(tmp_path / "slim")
    replaced = {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "adapter_model.safetensors", "adapter_config.json"),
    }
    kept = {".gitattributes", "notes.md", "onnx/model.onnx", "checkpoint-1/model.safetensors", "tokenizer.json"}
    output, server = upload(
        tmp_path / "slim", PUSH.format("repo_id='slim-bert'"), files={*replaced, *kept, "model.safetensors"}
    )
    assert output == ""
    assert operations(server) == (FILES, replaced)
    assert server.files == FILES | kept
    card = (tmp_path / "slim" / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("me/slim-bert")' in card and "# slim-bert\n" in card
    assert {path.name for path in (tmp_path / "slim").iterdir()} == {
        *(FILES | {".env", "data", "optimizer.pt", "training_args.bin", "checkpoint-3", "notes.txt"})
    }
    assert "create_pr" not in next(path for path, _ in server.calls if "/commit/" in path)


def test_the_command_for_an_upload_that_failed_names_only_what_was_saved(tmp_path):
    write_others(tmp_path / "slim")
    script = PUSH.format("repo_id='me/slim-bert', revision='v2'")
    output, _ = upload(tmp_path / "slim", script, faults={"/commit/": 500})
    assert output.endswith(
        f"upload it with `hf upload me/slim-bert {tmp_path}/slim --revision v2 --include README.md --include "
        "config.json --include model.safetensors --include modeling_hf_slim.py`, or save it again.\n"
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

save_slimmed(WithHead(masked()), sys.argv[1], push_to_hub=True, repo_id="me/x")
"""


def test_files_of_containers_are_uploaded(tmp_path):
    (tmp_path / "slim" / "1_Head").mkdir(parents=True)
    (tmp_path / "slim" / "1_Head" / "notes.bin").write_text("mine")
    there = {"1_Head/model.safetensors", "inner/adapter_config.json", "2_Other/model.safetensors"}
    _, server = upload(tmp_path / "slim", CONTAINER, files=there)
    inner = {f"inner/{name}" for name in FILES - {"README.md"}}
    assert operations(server) == (
        {"README.md", "1_Head/pytorch_model.bin", *inner},
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
    keywords, name, token, private, where, tmp_path
):
    _, server = upload(tmp_path / "slim", FIELDS.format(keywords))
    create = next(json.loads(body) for path, body in server.calls if path == "/api/repos/create")
    assert create["name"] == name
    assert (create.get("visibility") == "private" or create.get("private") is True) is private
    assert {sent for path, sent in server.tokens.items() if "/repos/create" in path or "/models/" in path} == {
        f"Bearer {token}"
    }
    assert next(path for path, _ in server.calls if "/commit/" in path).endswith(where)
    branch = where.removeprefix("/commit/")
    made = [path.rpartition("/")[2] for path, _ in server.calls if "/branch/" in path]
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
def test_stock_pushes_are_portable(how, tmp_path):
    """They upload the resizing file, and an `auto_map` that names it."""
    _, server = upload(tmp_path / "slim", STOCK_PUSH + STOCK_PUSHES[how])
    commits = [body for path, body in server.calls if "/commit/" in path]
    lines = [json.loads(line) for body in commits for line in body.splitlines()[1:]]
    files = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
    assert {"config.json", "model.safetensors", "modeling_hf_slim.py"} <= files.keys()
    config = json.loads(base64.b64decode(files["config.json"]["content"]))
    assert config["auto_map"]["AutoModel"] == "modeling_hf_slim.BertModel" and "hf_slim" in config
