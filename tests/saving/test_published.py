"""A folder that was saved before: its card written again, and its upload."""

import json

import numpy
import pytest
from sparse_models import masked

from hf_slim import push_slimmed, renew_card, save_slimmed
from hf_slim.saving.saved_report import read_report

PUSH = """
import sys
from hf_slim import push_slimmed
print(push_slimmed(sys.argv[1], "me/slim-bert", token="secret"{}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "slim"
    return folder, save_slimmed(masked(), folder)


def test_the_report_is_read_again(saved):
    folder, report = saved
    found = read_report(folder)
    assert (found.name, found.report) == ("slim", report)
    assert sorted(map(str, found.files)) == sorted(path.name for path in folder.iterdir())
    assert found.facts.class_name == "BertForSequenceClassification"
    assert found.facts.auto_class == "AutoModelForSequenceClassification" and found.facts.has_remote_code


def test_the_card_is_written_again_with_what_was_found_since(saved):
    folder, _ = saved
    before = (folder / "README.md").read_text()
    assert renew_card(folder) == folder / "README.md" and (folder / "README.md").read_text() == before
    renew_card(folder, metrics={"eval_f1": 0.75}, metrics_before={"eval_f1": 0.8125, "eval_loss": 1.0})
    text = (folder / "README.md").read_text()
    assert "| eval_f1 | 0.8125 | 0.7500 |  |\n\n" in text and "eval_loss" not in text
    assert "    - type: f1\n      value: 0.75\n" in text
    renew_card(folder)  # it is known from now on
    assert (folder / "README.md").read_text() == text
    renew_card(folder, metrics={}, metrics_before={})
    assert (folder / "README.md").read_text() == before


def test_what_was_saved_is_pushed_and_nothing_else(saved, worker, hub):
    folder, _ = saved
    names = {path.name for path in folder.iterdir()}
    (folder / ".env").write_text("mine")
    (folder / "rows.csv").write_text("mine")
    done = worker.run(PUSH.format(""), folder)
    assert done.status == 0, done.stderr[-3000:]
    commit = hub.repositories["me/slim-bert"].branches["main"][-1]
    assert done.stdout == f"{hub.address}/me/slim-bert/commit/{commit.oid}\n"
    files = hub.files("me/slim-bert")
    assert files.keys() == names | {".gitattributes"}
    assert b'from_pretrained("me/slim-bert")' in files["README.md"] and b"\n# slim-bert\n" in files["README.md"]
    assert all(files[name] == (folder / name).read_bytes() for name in names)
    hub.reset()
    hub.add_repository("me/slim-bert", {})
    done = worker.run(PUSH.format(", create_pr=True"), folder)
    assert done.stdout == f"{hub.address}/me/slim-bert/discussions/1\n", done.stderr[-3000:]


def test_numbers_of_other_libraries_are_numbers(saved):
    folder, _ = saved
    renew_card(folder, metrics={"eval_f1": numpy.float32(0.5)}, metrics_before={"eval_f1": float("nan")})
    assert "| eval_f1 | nan | 0.5000 |  |" in (folder / "README.md").read_text()
    text = (folder / "slim_report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["card"]["metrics_before"] == {"eval_f1": "nan"}
    renew_card(folder, metrics={}, metrics_before={})


@pytest.mark.parametrize("keyword", ["metrics", "metrics_before"])
def test_a_metric_that_is_no_number_is_refused_and_the_folder_stays(saved, keyword):
    folder, _ = saved
    before = {name: (folder / name).read_bytes() for name in ("README.md", "slim_report.json")}
    with pytest.raises(ValueError, match="metrics: eval_f1 must be a number, got '0.75'"):
        renew_card(folder, **{keyword: {"eval_f1": "0.75"}})
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_an_upload_that_fails_leaves_the_folder_as_it_was(saved, monkeypatch):
    folder, _ = saved
    before = {name: (folder / name).read_bytes() for name in ("README.md", "slim_report.json")}

    def fail(path, files, repo_id, hub_kwargs):
        assert f'from_pretrained("{repo_id}")' in (path / "README.md").read_text()
        raise RuntimeError("refused")

    monkeypatch.setattr("hf_slim.saving.published.push_folder", fail)
    with pytest.raises(RuntimeError, match="refused"):
        push_slimmed(folder, "me/x")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_folder_that_holds_no_slim_model_is_refused(tmp_path):
    for call in (renew_card, lambda folder: push_slimmed(folder, "me/x")):
        with pytest.raises(ValueError, match="holds no slim_report.json, so it was not written by save_slimmed"):
            call(tmp_path)
        (tmp_path / "slim_report.json").write_text("{}")
        with pytest.raises(ValueError, match="slim_report.json cannot be read: KeyError.*Save the model again"):
            call(tmp_path)
        (tmp_path / "slim_report.json").unlink()


def test_bad_names_and_missing_files_are_refused_before_anything_is_sent(tmp_path):
    folder = tmp_path / "slim"
    save_slimmed(masked(), folder, verify=False)
    assert json.loads((folder / "slim_report.json").read_text())["report"]["flops_before"] is None
    why = "Operations and latency are not known: nothing was run (verify=False)."
    assert f"\n{why}\n" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="Repo id must"):
        push_slimmed(folder, "a/b/c")
    with pytest.raises(TypeError, match="unexpected keyword argument 'branch'"):
        push_slimmed(folder, "me/x", branch="v2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="slim lacks model.safetensors, which was saved there: save the model again"):
        push_slimmed(folder, "me/x")
