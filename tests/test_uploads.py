"""Uploads to a Hub on this machine: what arrives, and what is left here when it fails half way."""

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
            repo = json.loads(body)["name"]
            answer = {"url": f"{self.server.address}/me/{repo}", "name": f"me/{repo}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = self.server.mode
            answer = {
                "files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            }
        elif "/commit/" in self.path:
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.address}/me/x/commit/0"}
        else:
            answer = {}
        self.answer(answer)

    def do_GET(self):
        self.server.calls.append((self.path, b""))
        if "/xet-write-token/" in self.path:
            self.send_error(403)
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


PUSH = """
import sys, time
from test_saving import masked
from hf_slim import save_slimmed
time.sleep = lambda seconds: None  # between the attempts
try:
    save_slimmed(masked(), sys.argv[1], push_to_hub=True, repo_id="me/slim-bert", token="secret", private=True)
except RuntimeError as error:
    print(error)
"""


def push(folder, faults=None, mode=lambda path: "regular", address=None, protocol="xet"):
    """Save and upload in a process of its own; what it printed, and the requests that the Hub got."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.calls = f"http://127.0.0.1:{server.server_port}", []
    server.faults, server.mode = faults or {}, mode
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tests = Path(__file__).parent
    environment = {**os.environ, "HF_ENDPOINT": address or server.address, "HF_HOME": str(folder.parent / "home")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    environment["HF_HUB_DISABLE_XET"] = "1" if protocol == "lfs" else "0"
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PUSH, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, server.calls


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
        f". The slim model is whole in {tmp_path}/slim: upload it with `hf upload me/slim-bert {tmp_path}/slim`, or "
        "save it again.\n"
    )
    assert "secret" not in output
    _, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim", output_loading_info=True)
    assert not any(report.values())


def test_a_hub_that_is_not_there(tmp_path):
    """Nothing listens at port 9."""
    output, _ = push(tmp_path / "slim", address="http://127.0.0.1:9")
    assert output.startswith("The upload to me/slim-bert failed: ") and "Connection refused" in output
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")
