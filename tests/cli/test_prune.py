"""hf-slim prune: a trained model slimmed in one shot, calibrated on a file."""

import json
from pathlib import Path

import pytest
import torch
from commands import refuse
from conftest import build
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from hf_slim.cli import main
from hf_slim.cli.tokenizer import make_byte_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "dull", "fine", "film", "play"]
HALF = ("--ffn2_sparsity", "0.5", "--mha_sparsity", "0.5", "--slim_round_to", "8", "--slim_scope", "local")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A classifier with its tokenizer, and a file of reviews."""
    build("bert").save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(tmp_path / "bert")
    rows = [f"{one} {two},{one}" for one in WORDS[5:9] for two in ("film", "play", "film play film")]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows * 3]))
    return tmp_path


@pytest.mark.parametrize("method", ["obs", "taylor"])
def test_a_classifier_is_slimmed_and_saved(reviews: Path, method: str, capsys: pytest.CaptureFixture) -> None:
    flags = ["--model_name_or_path", f"{reviews}/bert", "--train_file", f"{reviews}/reviews.csv"]
    flags += ["--output_dir", f"{reviews}/slim", "--num_calibration_samples", "16", "--method", method, *HALF]
    labels = ["--label_column", "label"]
    if method == "taylor":  # four classes, and the model knows two
        text = (reviews / "reviews.csv").read_text().replace(",dull", ",bad").replace(",fine", ",good")
        (reviews / "reviews.csv").write_text(text)
    assert main(["prune", *flags, *labels]) == 0
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.0.output.dense" in printed and "-50.0%" in printed
    slim = AutoModelForSequenceClassification.from_pretrained(reviews / "slim")
    assert slim.bert.encoder.layer[1].output.dense.weight.shape == (32, 32)
    assert AutoTokenizer.from_pretrained(reviews / "slim").vocab_size == len(WORDS)
    assert "| `bert.encoder.layer.1.output.dense` | ffn | 64 | 32 |" in (reviews / "slim" / "README.md").read_text()


def test_a_language_model_is_slimmed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build("gpt2", vocab_size=257, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "gpt2")
    make_byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    flags = ["--model_name_or_path", f"{tmp_path}/gpt2", "--train_file", f"{tmp_path}/text.txt"]
    flags += ["--output_dir", f"{tmp_path}/slim", "--num_calibration_samples", "20", "--max_seq_length", "16", *HALF]
    assert main(["prune", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["structures"][1] == {"name": "transformer.h.0.mlp.c_proj", "kind": "ffn", "before": 64, "after": 32}
    assert report["parameters_after"] < report["parameters_before"] and report["unproven"] == []
    slim = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert slim.transformer.h[0].mlp.c_proj.weight.shape == (32, 32)
    assert torch.isfinite(slim(input_ids=torch.arange(9)[None]).logits).all()


def test_too_few_rows_are_refused_and_nothing_is_written(reviews: Path) -> None:
    flags = ["--model_name_or_path", f"{reviews}/bert", "--train_file", f"{reviews}/reviews.csv"]
    message = refuse("prune", *flags, "--output_dir", f"{reviews}/slim", *HALF)
    assert message.startswith("The data set has 32 samples, and num_calibration_samples=512 asks for more: ")
    assert not (reviews / "slim").exists()


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--tokenizer_name"])
def test_a_path_where_nothing_is_is_refused(reviews: Path, flag: str) -> None:
    flags = ["--model_name_or_path", f"{reviews}/bert", "--train_file", f"{reviews}/reviews.csv", flag, "/no/model"]
    assert (
        refuse("prune", *flags, "--output_dir", f"{reviews}/slim") == f"{flag}: there is no file or folder /no/model."
    )
    assert not (reviews / "slim").exists()


def test_a_file_is_no_folder(reviews: Path) -> None:
    (reviews / "slim").write_text("")
    flags = ["--model_name_or_path", f"{reviews}/bert", "--train_file", f"{reviews}/reviews.csv"]
    message = refuse("prune", *flags, "--output_dir", f"{reviews}/slim", *HALF)
    assert message.endswith("slim' is a file; name a folder.")


def test_a_tokenizer_that_is_not_there_or_is_another_model_s_is_refused(reviews: Path) -> None:
    build("bert", vocab_size=50).save_pretrained(reviews / "few")
    make_byte_tokenizer().save_pretrained(reviews / "bytes")
    flags = ["--model_name_or_path", f"{reviews}/few", "--train_file", f"{reviews}/reviews.csv"]
    flags += ["--output_dir", f"{reviews}/slim", *HALF]
    assert refuse("prune", *flags) == f"There is no tokenizer in {reviews}/few: name one by --tokenizer_name."
    assert refuse("prune", *flags, "--tokenizer_name", f"{reviews}/bytes") == (
        f"The tokenizer of {reviews}/bytes has 257 tokens, but the model knows only 50: name the tokenizer that "
        f"belongs to {reviews}/few."
    )
    assert not (reviews / "slim").exists()


def test_what_the_model_does_not_read_is_refused(reviews: Path) -> None:
    build("vit").save_pretrained(reviews / "vit")
    flags = ["--train_file", f"{reviews}/reviews.csv", "--output_dir", f"{reviews}/slim", *HALF]
    message = refuse("prune", *flags, "--model_name_or_path", f"{reviews}/vit")
    assert message == f"{reviews}/vit, a ViTForImageClassification, reads no text: name a text model."
    message = refuse("prune", *flags, "--model_name_or_path", f"{reviews}/bert", "--max_seq_length", "513")
    assert message.startswith("--max_seq_length 513 is more than the model takes, 512: make it smaller")
    assert not (reviews / "slim").exists()
