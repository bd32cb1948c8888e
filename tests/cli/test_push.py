"""hf-slim push: what is uploaded, and what is refused."""

import pytest
from commands import refuse
from sparse_models import masked

from hf_slim import save_slimmed

PUSH = """
import sys
from hf_slim.cli import main
sys.exit(main(["push", *sys.argv[1:]]))
"""


@pytest.fixture
def slim(tmp_path):
    """The folder of a slim model, with what a training leaves in it."""
    folder = tmp_path / "slim"
    save_slimmed(masked(), folder)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"state")
    return folder


def test_a_slim_folder_is_uploaded_under_the_name_of_its_repository(slim, worker, hub):
    done = worker.run(PUSH, slim, "me/tiny", "--token", "secret", "--private")
    assert done.status == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"\nUploaded {slim} to me/tiny: {hub.address}/me/tiny/commit/")
    files = hub.files("me/tiny")
    assert files.keys() == {path.name for path in slim.iterdir() if path.is_file()} | {".gitattributes"}
    assert b'from_pretrained("me/tiny")' in files["README.md"]
    assert hub.repositories["me/tiny"].private


def test_a_branch_and_a_pull_request(slim, worker, hub):
    done = worker.run(PUSH, slim, "me/tiny", "--token", "secret", "--revision", "small")
    assert done.status == 0, done.stderr[-3000:]
    assert "config.json" in hub.files("me/tiny", "small")
    done = worker.run(PUSH, slim, "me/tiny", "--token", "secret", "--create-pr")
    assert done.status == 0 and "/discussions/" in done.stdout


def test_a_token_without_rights_is_one_line(slim, worker, hub):
    done = worker.run(PUSH, slim, "me/tiny", "--token", "nobody's")
    assert done.status == 2
    assert done.stderr.splitlines()[-1].startswith("hf-slim push: error: The upload to me/tiny failed: ")


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/ti ny", "me/"])
def test_what_is_no_repository_is_refused(slim, repo_id):
    message = refuse("push", slim, repo_id)
    assert "Repo id must" in message or "Cannot have" in message or "alphanumeric" in message


def test_a_branch_and_a_pull_request_at_once_are_refused(slim):
    message = refuse("push", slim, "me/tiny", "--create_pr", "--revision", "small")
    assert message.startswith("create_pr=True opens a pull request against the main branch")
