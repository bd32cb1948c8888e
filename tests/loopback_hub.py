"""A Hub on this machine, for the real client of huggingface_hub: it keeps files, commits, branches and pull requests.

It speaks what pushing and loading models use: repositories that are public or private, LFS objects that are sent once,
commits, branches, pull requests, listings, and files by revision with their ETag. It also fails where it is told to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = re.compile(r".*\.(safetensors|bin|png)")
USERS = {"secret": "me", "theirs": "me", "mine": "me", "visitor": "you"}
"""For each token the user; those that are not named here are refused."""


class Stored(NamedTuple):
    """A file in a repository, and whether it came as an LFS object."""

    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """What the Hub calls the content by."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    """What a branch holds from a commit on."""

    oid: str
    message: str
    files: dict[str, Stored]


@dataclass
class Repository:
    """The branches of a repository, pull requests among them, each with its commits, the last one last."""

    owner: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, or one by its id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


class HubServer(ThreadingHTTPServer):
    """The Hub.

    Attributes:
        address: What `HF_ENDPOINT` is to be.
        repositories: By their whole names.
        objects: The LFS objects, by SHA-256.
        calls: Every request since `reset`: method and path, and the body.
        tokens: For each path the `Authorization` that it was asked with last.
        faults: For parts of `METHOD PATH` how such requests fail: a status, `closed` for an answer that breaks off, or
            `half` for a body of which only a half is read.
        large: Which paths come as LFS objects.
        puts: How many LFS objects are taken before `PUT` fails; None for all.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self._numbers = 0
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def reset(self) -> None:
        """Forget everything but the numbers of commits, so that no commit has the id of another."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, bytes]] = []
        self.tokens: dict[str, str | None] = {}
        self.faults: dict[str, int | str] = {}
        self.large: Callable[[str], bool] = lambda path: LARGE.fullmatch(path) is not None
        self.puts: int | None = None

    def add_repository(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        """Make a repository with some files on its main branch."""
        repository = self.repositories[name] = Repository(name.partition("/")[0], private)
        stored = {path: Stored(content, self.large(path)) for path, content in files.items()}
        repository.branches["main"] = [Commit(self.make_oid(), "initial commit", stored)]
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision."""
        commit = self.repositories[name].find(revision)
        assert commit is not None, revision
        return {path: stored.content for path, stored in commit.files.items()}

    def asked(self, part: str) -> list[str]:
        """Those requests, as `METHOD PATH`, that hold a text."""
        return [call for call, _ in self.calls if part in call]

    def make_oid(self) -> str:
        """The id of a new commit."""
        self._numbers += 1
        return hashlib.sha1(b"commit %d of %d" % (self._numbers, self.server_port)).hexdigest()

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub for as long as the block runs."""
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()


class _Refused(Exception):
    """An answer that is an error: status, the Hub's code, a message, and what else the body holds."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        super().__init__(message or code or str(status))
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        call = f"{self.command} {self.path}"
        how = next((how for part, how in self.server.faults.items() if part in call), None)
        length = int(self.headers["Content-Length"] or 0)
        if self.command == "PUT" and how is None and self.server.puts is not None:
            how = "half" if self.server.puts == 0 else None
            self.server.puts -= how is None
        body = self.rfile.read(length // 2 if how == "half" else length)
        self.server.calls.append((call, body))
        self.server.tokens[self.path] = self.headers["Authorization"]
        if how == "closed":  # in the middle of the answer
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"half')
        if how in ("half", "closed"):
            self.close_connection = True
            return
        try:
            if isinstance(how, int):
                raise _Refused(how)
            self._answer(*self._find_answer(body))
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            if "commit" in refused.more:
                headers["X-Repo-Commit"] = refused.more["commit"]
            self._answer(json.dumps({"error": str(refused), **refused.more}).encode(), headers, refused.status)

    def _find_answer(self, body: bytes) -> tuple[bytes, dict[str, str]]:
        url = urlsplit(self.path)
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in method:
                parts = {key: unquote(value) for key, value in match.groupdict(default="").items()}
                found = getattr(self, f"_{name}")(body, parse_qs(url.query), **parts)
                return found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
        raise _Refused(404, message=f"nothing is served at {self.path}")

    def _answer(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _user(self) -> str | None:
        """Whose token the request came with; a token that nobody has is refused."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refused(401, message="Invalid user token.")
        return USERS.get(token)

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        user = self._user()
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and user != repository.owner):
            raise _Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise _Refused(401, message="Invalid username or password.")
        if write and user != repository.owner:
            raise _Refused(403, message=f"Forbidden: you are not allowed to write to {name}")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision or "main")
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _whoami(self, body: bytes, query: Any) -> dict[str, Any]:
        return {"name": self._user(), "type": "user"}

    def _create(self, body: bytes, query: Any) -> dict[str, Any]:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise _Refused(401, message="Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise _Refused(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")
        url = f"{self.server.address}/{name}"
        if name in self.server.repositories:
            raise _Refused(409, message="You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.add_repository(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return {"url": url, "name": name}

    def _branch(self, body: bytes, query: Any, name: str, branch: str) -> dict[str, Any]:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise _Refused(409, message=f"Reference already exists: {branch}")
        repository.branches[branch] = [*repository.branches["main"]]
        return {}

    def _preupload(self, body: bytes, query: Any, name: str, revision: str) -> dict[str, Any]:
        there = self._commit_of(self._repository(name), revision).files
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if self.server.large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": there[path].oid if path in there else None,
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
        }

    def _batch(self, body: bytes, query: Any, name: str) -> dict[str, Any]:
        self._repository(name)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.address}/lfs/{asked['oid']}", "header": {}}
            objects.append(asked if asked["oid"] in self.server.objects else {**asked, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, query: Any, oid: str) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, message="the content is not what was announced")
        self.server.objects[oid] = body
        return {}

    def _commit(self, body: bytes, query: dict[str, list[str]], name: str, revision: str) -> dict[str, Any]:
        is_pull_request = query.get("create_pr") == ["1"]
        repository = self._repository(name, write=not is_pull_request)
        if self._user() is None:
            raise _Refused(401, message="Invalid username or password.")
        files = dict(self._commit_of(repository, revision).files)
        header, *operations = (json.loads(line) for line in body.splitlines())
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            if key == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), is_large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Refused(400, message=f"the LFS object of {value['path']} was never uploaded")
                files[value["path"]] = Stored(self.server.objects[value["oid"]], is_large=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, message=f"no such operation: {key}")
        number = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
        branch = f"refs/pr/{number}" if is_pull_request else revision
        commit = Commit(self.server.make_oid(), header["value"]["summary"], files)
        repository.branches[branch] = [*repository.branches[revision], commit]
        url = f"{self.server.address}/{name}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        return answer

    def _info(self, body: bytes, query: Any, name: str, revision: str) -> dict[str, Any]:
        repository = self._repository(name)
        commit = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {"id": name, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []}

    def _refs(self, body: bytes, query: Any, name: str) -> dict[str, Any]:
        repository = self._repository(name)
        heads = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
            for branch, commits in repository.branches.items()
            if not branch.startswith("refs/pr/")
        ]
        return {"branches": heads, "converts": [], "tags": []}

    def _tree(self, body: bytes, query: Any, name: str, revision: str, folder: str) -> list[dict[str, Any]]:
        commit = self._commit_of(self._repository(name), revision)
        entries = []
        for path, stored in sorted(commit.files.items()):
            if path.startswith(folder):
                entry = {"type": "file", "path": path, "size": len(stored.content), "oid": stored.oid}
                if stored.is_large:
                    entry["lfs"] = {"oid": stored.oid, "size": len(stored.content), "pointerSize": 130}
                entries.append(entry)
        if folder and not entries:
            raise _Refused(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        return entries

    def _resolve(self, body: bytes, query: Any, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self._commit_of(self._repository(name), revision)
        if path not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found", commit=commit.oid)
        stored = commit.files[path]
        headers = {"ETag": f'"{stored.oid}"', "X-Repo-Commit": commit.oid, "Content-Type": "application/octet-stream"}
        if stored.is_large:
            headers |= {"X-Linked-Etag": f'"{stored.oid}"', "X-Linked-Size": str(len(stored.content))}
        return stored.content, headers

    def _validate(self, body: bytes, query: Any) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def _xet(self, body: bytes, query: Any, **parts: str) -> dict[str, Any]:
        raise _Refused(403, message="no such storage here")


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>refs%2Fpr%2F\d+|refs/pr/\d+|[^/]+)"
_MODEL = f"/api/models/{_NAME}"
_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"{_MODEL}/branch/(?P<branch>.+)", "branch"),
    ("POST", f"{_MODEL}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    ("POST", f"{_MODEL}/commit/{_REVISION}", "commit"),
    ("GET", f"{_MODEL}/xet-write-token/{_REVISION}", "xet"),
    ("GET", f"{_MODEL}/refs", "refs"),
    ("GET", f"{_MODEL}/tree/{_REVISION}(/(?P<folder>.+))?", "tree"),
    ("GET", f"{_MODEL}(/revision/{_REVISION})?", "info"),
    ("GET HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
