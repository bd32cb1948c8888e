"""The demo: its files, and its run cut short."""

import csv
import json

import pytest
from commands import refuse

from hf_slim.cli import main
from hf_slim.cli.demo import write_demo
from hf_slim.cli.tokenizer import load_tokenizer


def _read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_are_the_same_every_time(tmp_path):
    write_demo(tmp_path / "one")
    write_demo(tmp_path / "two")
    for name in ("train.csv", "validation.csv", "vocab.txt", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    rows = _read(tmp_path / "one" / "train.csv")
    assert (len(rows), len(_read(tmp_path / "one" / "validation.csv"))) == (4000, 500)
    assert all(0 <= float(row["score"]) <= 5 for row in rows)


def test_every_word_is_in_the_vocabulary(tmp_path):
    write_demo(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"))
    for row in _read(tmp_path / "train.csv")[:200]:
        ids = tokenizer(row["sentence1"], row["sentence2"])["input_ids"]
        assert len(ids) == 17
        assert tokenizer.unk_token_id not in ids
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(tokenizer)


def test_like_opinions_score_high(tmp_path):
    write_demo(tmp_path)
    same = [
        float(row["score"])
        for row in _read(tmp_path / "train.csv")
        if row["sentence1"].split()[-1] == row["sentence2"].split()[-1]
    ]
    opposite = [
        float(row["score"])
        for row in _read(tmp_path / "train.csv")
        if {row["sentence1"].split()[-1], row["sentence2"].split()[-1]} == {"awful", "superb"}
    ]
    assert sum(same) / len(same) > 4.6
    assert sum(opposite) / len(opposite) < 0.4


def test_the_demo_takes_the_flags_of_a_run(tmp_path, capsys):
    flags = ["--max_steps", "2", "--ffn2_sparsity", "0.8", "--mha_sparsity", "0", "--json"]
    assert main(["demo", "--output_dir", str(tmp_path / "out"), *flags]) == 0
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    # 80% of 4 * 512 channels, rounded to what layers of multiples of 32 leave: each has 128 rows, columns and a bias.
    removed = figures["dense"]["parameters"] - figures["slimmed"]["parameters"]
    assert removed % (32 * 257) == 0
    assert 0.7 < removed / (2048 * 257) <= 0.8
    assert json.loads(capsys.readouterr().out) == figures


@pytest.mark.slow
def test_the_demo_loses_next_to_nothing(tmp_path):
    assert main(["demo", "--output_dir", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert figures["dense"]["metrics"]["pearson"] > 0.93
    assert figures["slimmed"]["metrics"]["pearson"] > figures["dense"]["metrics"]["pearson"] - 0.01
    assert figures["slimmed"]["parameters"] < 0.55 * figures["dense"]["parameters"]


def test_files_of_others_are_not_written_over(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("mine")
    message = refuse("demo", "--output_dir", tmp_path)
    assert message == f"{tmp_path / 'data' / 'train.csv'} is there and is not the demo's: name another --output_dir."
    (tmp_path / "data" / "train.csv").unlink()
    (tmp_path / "data" / "config.json").write_text("mine")
    assert refuse("demo", "--output_dir", tmp_path).startswith(f"{tmp_path / 'data' / 'config.json'} is there and is")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "config.json"]


def test_a_refused_demo_leaves_nothing_and_takes_a_file_of_flags(tmp_path):
    (tmp_path / "flags.json").write_text(json.dumps({"output-dir": str(tmp_path / "out"), "mha-sparsity": 0.9}))
    assert refuse("demo", tmp_path / "flags.json", "--max_steps", "2").startswith("mha_sparsity=0.9 is unreachable")
    assert [path.name for path in tmp_path.iterdir()] == ["flags.json"]
