"""`hf-slim bench`: its flags, and a whole run on a tiny model. No figure of time is checked."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

from hf_slim.bench.flags import PARTS, BenchArguments, Sparsity
from hf_slim.bench.shapes import SHAPES, count_flops, make_cases
from hf_slim.bench.tables import find_growth
from hf_slim.cli import main

WIDTH, CHANNELS, HEADS, LAYERS, WORDS, POSITIONS = 32, 128, 4, 2, 99, 16
BATCH, LENGTH, LABELS = 2, 8, 2
PNG = b"\x89PNG\r\n\x1a\n"


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
    LlamaConfig(**bert, num_key_value_heads=2, intermediate_size=CHANNELS).to_json_file(tmp_path / "llama.json")
    GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS).to_json_file(tmp_path / "gpt2.json")
    T5Config().to_json_file(tmp_path / "t5.json")
    ViTConfig().to_json_file(tmp_path / "vit.json")
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
    assert list(steps) == ["plain", "scoring", "masked", "live", "pruning", "pruning live"]
    assert (steps["plain"]["against_plain"], steps["plain"]["extra_ms"]) == (1, 0)
    assert all(0 < steps[step]["extra"] <= steps[step]["extra_most"] for step in ("scoring", "masked", "pruning"))
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
    assert list(memory)[:2] == ["plain step", "scoring step"] and memory["plain step"]["ratio"] in (1, None)
    assert {"compact", "save dense", "save slim", "load dense", "load slim"} < memory.keys()

    assert (folder / "out" / "speedup.png").read_bytes()[:8] == PNG
    page, printed = (folder / "out" / "bench.md").read_text(), capsys.readouterr().out
    for title in ("Train steps", "Fine-tuning runs", "Inference", "Saving, loading", "Peak memory"):
        assert f"## {title}\n\n| model | layers | FFN2,MHA |" in page
        assert f"{title}\n\nmodel" in printed
    assert f"| {parameters:,} | {left:,} |" in page


def test_costs_at_several_depths(folder):
    results = _run(_flags(folder, models=f"{folder}|{folder / 'gpt2.json'}", layers="1|3", parts="times"))
    assert [record["layers"] for record in results["times"]] == [1, 3, 1, 3]
    bert = [record["parameters"] for record in results["times"][:2]]
    layer = _parameters(CHANNELS, WIDTH) - bert[0]  # two layers less one
    assert bert[1] == bert[0] + 2 * layer
    assert [(r["cost"], r["layers"]) for r in results["growth"][:2]] == [("first_parse", 1), ("first_parse", 3)]
    assert not (folder / "out" / "speedup.png").exists()


def test_growth_is_that_of_a_layer():
    costs = ("first_parse_s", "parse_s", "score_s", "compact_s", "save_slimmed_s", "load_slim_s")
    times = [
        {"model": "m", "sparsity": "0.5,0", "layers": layers, **dict.fromkeys(costs, seconds)}
        for layers, seconds in ((12, 0.9), (6, 0.3))
    ]
    step = {"model": "m", "sparsity": "0.5,0", "step": "masked", "batch_size": 8, "sequence_length": 128}
    train = [{**step, "layers": 6, "extra_ms": 3}, {**step, "layers": 12, "extra_ms": 6}]
    growth = find_growth({"times": times, "train": train})
    assert [(r["cost"], r["layers"], r["ms"]) for r in growth[2:4]] == [("parse", 6, 300), ("parse", 12, 900)]
    assert [(r["ms_per_layer"], r["ratio"]) for r in growth[2:4]] == [(50, 1), (75, 1.5)]
    assert growth[-1] == {
        "model": "m",
        "sparsity": "0.5,0",
        "cost": "extra of a masked step, 8 x 128",
        "layers": 12,
        "ms": 6,
        "ms_per_layer": 0.5,
        "ratio": 1,
    }
    assert find_growth({"times": times[:1]}) == []


def test_a_stock_shape(folder):
    case, ffn_only = make_cases(
        BenchArguments([str(folder / "llama.json")], sequence_lengths=[8], sparsities=["0.5,0.5", "0.5,0"])
    )
    assert case.is_stock and ffn_only.is_stock
    assert (case.slim_config.num_attention_heads, case.slim_config.num_key_value_heads) == (2, 1)
    assert (case.slim_config.intermediate_size, ffn_only.slim_config.intermediate_size) == (64, 64)
    assert case.removed == 0.5
    # The FFN, three of width by channels; attention, two of width by width, and two by half of it.
    ffn, attention = 3 * WIDTH * CHANNELS, 3 * WIDTH * WIDTH
    assert ffn_only.removed == pytest.approx(ffn / 2 / (ffn + attention))
    # Forward and backward pass do three times the products of the forward pass, all of whose inputs have gradients.
    assert count_flops(case.config, 2, 8, backward=True) == 3 * count_flops(case.config, 2, 8)


def test_the_shapes_have_their_sizes():
    cases = make_cases(BenchArguments(list(SHAPES), sparsities=["0.5,0.5"]))
    sizes = {case.name: round(case.parameters / 1e6) for case in cases}
    assert sizes == {"bge-small": 33, "bge-base": 109, "bert-large": 335, "gpt2": 124, "llama-1b": 1100}
    assert [case.is_stock for case in cases] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "bge-tiny"}, r"--models bge-tiny: there is no such shape, file or folder\. Name one of bge-small"),
        ({"models": "{folder}/t5.json"}, r"--models .*t5\.json is a t5 model; bench takes text encoders"),
        ({"models": "{folder}/vit.json"}, r"--models .*vit\.json is a vit model; bench takes text encoders"),
        ({"batch_sizes": "0"}, "--batch_sizes must be a whole number from 1, got 0"),
        ({"sequence_lengths": "8|17"}, "--sequence_lengths 17 is more than .* takes, 16: make it smaller"),
        ({"layers": "-2"}, "--layers must be a whole number from 1, got -2"),
        ({"repeats": "0"}, "--repeats must be a whole number from 1, got 0"),
        ({"threads": "0"}, "--threads must be a whole number from 1, got 0"),
        ({"parts": "train|test"}, "--parts must be one of train, run, inference, times, memory, got 'test'"),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, got 'int8'"),
        ({"device": "tpu"}, "--device must be one of cpu, cuda, got 'tpu'"),
        ({"sparsities": "0.5"}, r"--sparsities takes two numbers .*, such as 0\.8,0\.6, got '0\.5'"),
        ({"sparsities": "0.5,half"}, "--sparsities takes two numbers .*, got '0.5,half'"),
        ({"sparsities": "0.5,1.5"}, r"--sparsities 0\.5,1\.5: mha_sparsity must be in \[0, 1\), got 1\.5"),
        ({"sparsities": "0,0"}, "--sparsities 0,0 removes nothing"),
        ({"sparsities": "0.9,0.5"}, r"--sparsities 0\.9,0\.5: ffn2_sparsity=0\.9 is unreachable: of the 128 units"),
        ({"output_dir": "{folder}/vit.json"}, r"--output_dir .*vit\.json is a file; name a folder"),
    ],
)
def test_bad_flags_are_refused_before_any_work(folder, changes, message):
    changes = {name: value.format(folder=folder) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main(["bench", *_flags(folder, **changes)])
    assert not (folder / "out").exists()


def test_cuda_is_refused_where_there_is_none(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no GPU here"):
        main(["bench", *_flags(folder, device="cuda")])


def test_matplotlib_is_asked_for_before_any_work(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(RuntimeError, match=r'pip install "hf-slim\[bench\]"'):
        main(["bench", *_flags(folder)])
    assert not (folder / "out").exists()


def test_a_sparsity_is_written_as_it_is_read():
    (sparsity,) = BenchArguments(["gpt2"], sparsities=["0.80,0"]).parsed_sparsities
    assert sparsity == Sparsity(0.8, 0.0) and str(sparsity) == "0.8,0"


def test_usage(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["bench", "--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--models", "--batch_sizes", "--sparsities", "--parts", "--layers", "--output_dir"):
        assert flag in printed
    with pytest.raises(SystemExit) as raised:
        main(["bench"])
    assert raised.value.code == 2
