"""`hf-slim bench`: a whole run on a tiny model. No figure of time is checked."""

import json
import re
import sys
from pathlib import Path

import pytest
from commands import refuse
from transformers import BertConfig, GPT2Config

from hf_slim.bench.flags import PARTS
from hf_slim.cli import main

WIDTH, CHANNELS, HEADS, LAYERS, WORDS, POSITIONS = 32, 128, 4, 2, 99, 16
BATCH, LENGTH, LABELS = 2, 8, 2
PNG = b"\x89PNG\r\n\x1a\n"

SCORING = ("scoring", "scoring snip", "scoring fisher")


def _parameters(channels: int, width: int) -> int:
    """Of the classifier: embeddings, layers of so many channels and heads of that width together, pooler, head."""
    embeddings = (WORDS + POSITIONS + 2) * WIDTH + 2 * WIDTH
    attention = 3 * (WIDTH + 1) * width + (width + 1) * WIDTH + 2 * WIDTH
    ffn = (WIDTH + 1) * channels + (channels + 1) * WIDTH + 2 * WIDTH
    return embeddings + LAYERS * (attention + ffn) + (WIDTH + 1) * WIDTH + (WIDTH + 1) * LABELS


def _flops(channels: int, width: int) -> int:
    """Two for each product: four projections, scores and weighted values, two FFN layers; pooler and head."""
    tokens = BATCH * LENGTH
    layer = 4 * tokens * WIDTH * width + 2 * tokens * LENGTH * width + 2 * tokens * WIDTH * channels
    return 2 * (LAYERS * layer + BATCH * WIDTH * (WIDTH + LABELS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The configs of tiny models."""
    bert = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    BertConfig(**bert, intermediate_size=CHANNELS, max_position_embeddings=POSITIONS).save_pretrained(tmp_path)
    GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS).to_json_file(tmp_path / "gpt2.json")
    return tmp_path


def _flags(folder: Path, **changes: object) -> list[str]:
    flags = {
        "models": folder,
        "batch_sizes": BATCH,
        "sequence_lengths": LENGTH,
        "sparsities": "0.5,0.5",
        "repeats": 2,
        "run_steps": 4,
        "run_repeats": 1,
        "threads": 1,
        "output_dir": folder / "out",
    }
    return [part for name, value in (flags | changes).items() for part in (f"--{name}", *str(value).split("|"))]


def _run(flags: list[str]) -> dict:
    assert main(["bench", *flags]) == 0
    return json.loads((Path(flags[flags.index("--output_dir") + 1]) / "bench.json").read_text())


def test_a_whole_run(folder, capsys):
    results = _run(_flags(folder))
    who = {"model": str(folder), "layers": LAYERS, "sparsity": "0.5,0.5"}
    size = {"batch_size": BATCH, "sequence_length": LENGTH}
    assert set(results) == {"command", "environment", *PARTS, "growth"}
    assert all(record.items() >= who.items() for part in PARTS for record in results[part])
    assert all(record.items() >= size.items() for part in PARTS if part != "times" for record in results[part])
    assert results["environment"]["threads"] == 1
    assert results["command"].startswith(f"hf-slim bench --models {folder} --batch_sizes 2 --sequence_lengths 8 ")

    steps = {record["step"]: record for record in results["train"]}
    assert list(steps) == ["plain", "teacher", *SCORING, "masked", "live", "pruning", "pruning live"]
    assert (steps["plain"]["against_plain"], steps["plain"]["extra_ms"]) == (1, 0)
    assert all(0 < steps[step]["extra"] <= steps[step]["extra_most"] for step in (*SCORING, "masked", "pruning"))
    assert steps["live"]["fraction"] == pytest.approx(steps["live"]["speed_up"] / steps["live"]["ideal"])

    dense, slim = _flops(CHANNELS, WIDTH), _flops(CHANNELS // 2, WIDTH // 2)
    (inference,) = results["inference"]
    assert (inference["dense_flops"], inference["slim_flops"]) == (dense, slim)
    assert inference["ideal"] == pytest.approx(dense / slim)
    assert inference["speed_up"] == pytest.approx(inference["dense_ms"] / inference["slim_ms"])
    assert inference["stock_from"] == "config with shape record"

    (run,) = results["run"]
    assert run["steps"] == 4
    assert run["speed_up"] == pytest.approx(run["dense_s"] / run["slim_s"])

    (times,) = results["times"]
    parameters, left = _parameters(CHANNELS, WIDTH), _parameters(CHANNELS // 2, WIDTH // 2)
    assert (times["parameters"], times["slim_parameters"]) == (parameters, left)
    assert times["share"] == pytest.approx(left / parameters)
    assert all(seconds > 0 for name, seconds in times.items() if name.endswith("_s"))

    memory = {record["what"]: record for record in results["memory"]}
    assert list(memory)[:3] == ["plain step", "teacher step", "scoring step"] and memory["plain step"]["ratio"] in (
        1,
        None,
    )
    assert {"compact", "save dense", "save slim", "load dense", "load slim"} < memory.keys()

    assert (folder / "out" / "speedup.png").read_bytes()[:8] == PNG
    page, printed = (folder / "out" / "bench.md").read_text(), capsys.readouterr().out
    for title in ("Train steps", "Fine-tuning runs", "Inference", "Saving, loading", "Peak memory"):
        assert f"## {title}\n\n| model | layers | FFN2,MHA |" in page
        assert f"{title}\n\nmodel" in printed
    assert f"| {parameters:,} | {left:,} |" in page


def test_costs_at_several_depths(folder, capsys):
    flags = _flags(folder, models=f"{folder}|{folder / 'gpt2.json'}", layers="1|3", parts="times")
    assert main(["bench", *flags, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((folder / "out" / "bench.json").read_text())
    assert [record["layers"] for record in results["times"]] == [1, 3, 1, 3]
    bert = [record["parameters"] for record in results["times"][:2]]
    layer = _parameters(CHANNELS, WIDTH) - bert[0]  # two layers less one
    assert bert[1] == bert[0] + 2 * layer
    assert [(r["cost"], r["layers"]) for r in results["growth"][:2]] == [("first_parse", 1), ("first_parse", 3)]
    assert not (folder / "out" / "speedup.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "bge-tiny"}, "--models bge-tiny: there is no such shape"),
        ({"parts": "train|test"}, "--parts must be one of train, run, inference, times, memory, got 'test'"),
        ({"sparsities": "0.9,0.5"}, r"--sparsities 0\.9,0\.5: ffn2_sparsity=0\.9 is unreachable: of the 128 units"),
    ],
)
def test_bad_flags_are_refused_before_any_work(folder, changes, message):
    assert re.search(message, refuse("bench", *_flags(folder, **changes)))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--models", "gpt2"]])
def test_without_the_extra_one_line_says_what_to_install(flags, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("hf_slim.bench", "matplotlib."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refuse("bench", *flags) == "this needs matplotlib: `pip install matplotlib`"


def test_usage(capsys):
    assert main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("--models", "--batch_sizes", "--sparsities", "--parts", "--layers", "--output_dir"):
        assert flag in printed
    assert refuse("bench") == "--models must be given; `hf-slim bench --help` lists the flags."
