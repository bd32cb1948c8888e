"""hf-slim compact: an already sparse model made smaller, with all that lies beside it."""

import json

import pytest
import torch
from commands import refuse
from conftest import build, logits, make_batch
from sparse_models import masked
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from hf_slim.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]


@pytest.fixture
def sparse(tmp_path):
    """The folder of a sparse model with a tokenizer, a card, somebody's file and what a training leaves."""
    folder = tmp_path / "sparse"
    masked().save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    (folder / "labels.txt").write_text("good\nbad\n")
    (folder / "training_args.bin").write_bytes(b"state")
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"state")
    return folder


def test_zero_units_leave_the_model_and_the_other_files_come_along(sparse, tmp_path, capsys):
    assert main(["compact", str(sparse), str(tmp_path / "slim"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["structures"][0] == {
        "name": "bert.encoder.layer.0.attention.output.dense",
        "kind": "mha",
        "before": 4,
        "after": 2,
    }
    assert report["unproven"] == [] and report["bytes_after"] < report["bytes_before"]

    dense = AutoModelForSequenceClassification.from_pretrained(sparse)
    slim = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim")
    batch = make_batch(dense)
    torch.testing.assert_close(logits(slim.eval(), batch), logits(dense.eval(), batch), atol=1e-5, rtol=1e-5)
    assert slim.num_parameters() == report["parameters_after"] < dense.num_parameters()

    kept = {path.name for path in (tmp_path / "slim").iterdir()}
    assert {"labels.txt", "tokenizer_config.json", "tokenizer.json", "modeling_hf_slim.py"} <= kept
    assert not kept & {"training_args.bin", "checkpoint-4"}
    assert (tmp_path / "slim" / "tokenizer.json").read_bytes() == (sparse / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "slim").vocab_size == len(WORDS)
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "license: mit" in card and "# Mine" in card and "# Slimmed with hf_slim" in card


def test_folders_of_further_modules_come_along(sparse, tmp_path, capsys):
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Dense", "type": "Dense"}]
    (sparse / "modules.json").write_text(json.dumps(modules))
    (sparse / "1_Dense").mkdir()
    (sparse / "1_Dense" / "model.safetensors").write_bytes(b"weights")
    assert main(["compact", str(sparse), str(tmp_path / "slim")]) == 0
    assert (tmp_path / "slim" / "1_Dense" / "model.safetensors").read_bytes() == b"weights"
    assert "bert.encoder.layer.0.output.dense" in capsys.readouterr().out


def test_further_chat_templates_come_along(sparse, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(sparse)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(sparse)
    assert main(["compact", str(sparse), str(tmp_path / "slim")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "slim").chat_template == tokenizer.chat_template


def test_an_adapter_beside_the_weights_is_merged(sparse, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'hf-slim[integrations]'")
    config = peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(masked(), config).save_pretrained(sparse)
    adapted = AutoModelForSequenceClassification.from_pretrained(sparse).eval()
    assert main(["compact", str(sparse), str(tmp_path / "slim")]) == 0
    slim = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").eval()
    batch = make_batch(slim)
    torch.testing.assert_close(logits(slim, batch), logits(adapted, batch), atol=1e-5, rtol=1e-5)
    assert not list((tmp_path / "slim").glob("adapter_*"))


def test_a_model_can_be_slimmed_where_it_is(sparse):
    before = (sparse / "model.safetensors").stat().st_size
    assert main(["compact", str(sparse), str(sparse)]) == 0
    assert (sparse / "model.safetensors").stat().st_size < before
    assert (sparse / "checkpoint-4" / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: "./nowhere", "IN: there is no file or folder ./nowhere."),
        (lambda folder: "user/no-model", "couldn't find them in the cached files"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{}"), "Unrecognized model in "),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "bert"})),
            "names no class, which transformers does not have: load the model by its own class",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "model.safetensors is damaged"),
    ],
)
def test_what_is_no_model_is_refused_and_nothing_is_written(sparse, tmp_path, change, message):
    given = change(sparse)
    source = given if isinstance(given, str) else sparse
    assert message in refuse("compact", source, tmp_path / "slim")
    assert {path.name for path in tmp_path.iterdir()} == {"sparse"}


def test_a_file_is_no_folder_for_the_slim_model(sparse):
    assert refuse("compact", sparse, sparse / "config.json").endswith("config.json' is a file; name a folder.")


def test_a_slim_model_that_computes_something_else_is_refused(sparse, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_slim.cli.compact.load_model", lambda source: build("bert").train())
    monkeypatch.setattr("hf_slim.saving.save.find_removable", _cut_what_is_used)
    assert "Nothing was saved" in refuse("compact", sparse, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def _cut_what_is_used(model, multiple, masks):
    from hf_slim import find_structures

    structures = find_structures(model).structures
    return structures, {s.name: torch.arange(s.units) < s.units // 2 for s in structures}


def test_a_model_without_zero_units_is_told_of(sparse, tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("hf_slim.cli.compact.logger.warning", told.append)
    assert main(["compact", str(sparse), str(tmp_path / "slim")]) == 0
    assert told == []
    assert main(["compact", str(tmp_path / "slim"), str(tmp_path / "again")]) == 0
    assert told == [
        f"No unit of {tmp_path / 'slim'} is zero, or too few for a multiple of 32, so that nothing was removed: "
        f"{tmp_path / 'again'} holds the same model."
    ]
