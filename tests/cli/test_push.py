"""hf-slim push: what is uploaded, and what is refused."""

import json

import pytest
from commands import refuse
from sparse_models import masked

from hf_slim import save_slimmed
from hf_slim.cli import main


@pytest.fixture
def slim(tmp_path):
    """The folder of a slim model, with what a training leaves in it."""
    folder = tmp_path / "slim"
    save_slimmed(masked(), folder)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"state")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "upload.lock").write_text("")
    return folder


@pytest.fixture
def uploads(monkeypatch):
    """What is handed to the upload, with the card as it is then."""
    calls = []

    def push_folder(folder, written, repo_id, keywords):
        calls.append((sorted(map(str, written)), repo_id, dict(keywords), (folder / "README.md").read_text()))

    monkeypatch.setattr("hf_slim.cli.push.push_folder", push_folder)
    return calls


def test_a_slim_folder_is_uploaded_under_the_name_of_its_repository(slim, uploads, capsys):
    assert main(["push", str(slim), "me/tiny"]) == 0
    ((files, repo_id, keywords, card),) = uploads
    assert files == ["README.md", "config.json", "model.safetensors", "modeling_hf_slim.py"]
    assert (repo_id, keywords) == ("me/tiny", {})
    assert 'from_pretrained("me/tiny")' in card and 'from_pretrained("slim")' not in card
    assert capsys.readouterr().out == f"\nUploaded 4 files of {slim} to me/tiny.\n"


def test_the_flags_of_a_push(slim, uploads, capsys):
    flags = ["--private", "--token", "hf_x", "--revision", "small"]
    assert main(["push", str(slim), "me/tiny", *flags]) == 0
    assert uploads[0][2] == {"private": True, "token": "hf_x", "revision": "small"}
    assert capsys.readouterr().out.endswith("to me/tiny, branch small.\n")
    for flag in ("--create_pr", "--create-pr"):
        assert main(["push", str(slim), "me/tiny", flag]) == 0
        assert uploads[-1][2] == {"create_pr": True}


def test_an_upload_that_fails_is_one_line_and_leaves_the_card_as_it_was(slim):
    before = (slim / "README.md").read_bytes()
    message = refuse("push", slim, "me/tiny", "--token", "hf_x")  # the tests are offline
    assert message.startswith("The upload to me/tiny failed: ")
    assert f"The slim model is whole in {slim}" in message
    assert (slim / "README.md").read_bytes() == before


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/ti ny", "me/", "--"])
def test_what_is_no_repository_is_refused(slim, uploads, repo_id):
    message = refuse("push", slim, repo_id) if repo_id != "--" else refuse("push", slim, "--", "-x-")
    assert "Repo id must" in message or "Cannot have" in message or "alphanumeric" in message
    assert uploads == []


def _no_mark(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hf_slim"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("# Mine\n")


def _bad_card(folder):
    _no_mark(folder)
    (folder / "README.md").write_text("---\ntags: [\n---\n")


@pytest.mark.parametrize("command", ["push", "card"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no slim model: it has no config.json."),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no slim model: it has no weights."),
        (_no_mark, "holds no slim model: neither its config.json nor its README.md says so."),
        (_bad_card, "README.md cannot be read: "),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is no JSON: "),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is no config: it holds a list."),
    ],
)
def test_a_folder_that_holds_no_slim_model_is_refused(slim, uploads, command, change, message):
    change(slim)
    assert message in refuse(command, slim, *(["me/tiny"] if command == "push" else []))
    assert uploads == []


def test_other_things_that_cannot_be_pushed_are_refused(slim, uploads):
    assert refuse("push", slim / "nowhere", "me/tiny") == f"There is no folder {slim / 'nowhere'}."
    message = refuse("push", slim, "me/tiny", "--create_pr", "--revision", "small")
    assert message.startswith("create_pr=True opens a pull request against the main branch")
    (slim / "README.md").unlink()
    assert refuse("push", slim, "me/tiny") == f"{slim} has no model card: write one with `hf-slim card {slim}`."
    assert uploads == []
