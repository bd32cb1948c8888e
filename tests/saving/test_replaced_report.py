"""Which uploads do away with the report of a slim model."""

from types import SimpleNamespace

from huggingface_hub import HfApi
from transformers import Trainer

from hf_slim.saving.replaced_report import replacing_report, upload_replacing

STALE = ["slim_report.json", "hf_slim_layers.svg"]


def upload(**keywords):
    """The keywords that the client is given."""
    return upload_replacing(lambda api, **given: given, None, **keywords)


def test_folders_that_a_trainer_uploads():
    assert upload(repo_id="me/x") == {"repo_id": "me/x"}
    with replacing_report():
        assert upload() == {"ignore_patterns": STALE, "delete_patterns": STALE}
        assert upload(ignore_patterns=["_*"], delete_patterns="a") == {
            "ignore_patterns": ["_*", *STALE],
            "delete_patterns": ["a", *STALE],
        }
        assert upload(path_in_repo="last-checkpoint") == {"path_in_repo": "last-checkpoint"}
    assert upload() == {}


def test_a_push_in_the_middle_of_a_training_is_one(tmp_path, monkeypatch):
    """Which goes by the library's own method, whose keywords are given as its caller gives them."""
    given = []

    def commit(api, repo_id, operations, **keywords):
        given.extend((type(operation).__name__, operation.path_in_repo) for operation in operations)
        return SimpleNamespace()

    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda api, **keywords: [*STALE, "notes.md"])
    (tmp_path / "config.json").write_text("{}")

    class Pushing(Trainer):
        def __init__(self):
            """It has nothing to train."""

        def is_world_process_zero(self):
            return self._upload()

        def _upload(self):
            HfApi(endpoint="http://127.0.0.1:9", token=False).upload_folder(repo_id="me/x", folder_path=tmp_path)
            return False  # and the method goes no further

    Pushing()._push_from_checkpoint(str(tmp_path))
    deleted = sorted(("CommitOperationDelete", name) for name in STALE)
    assert sorted(given) == sorted([("CommitOperationAdd", "config.json"), *deleted])
