"""Slim models leave PyTorch and transformers: the cheap ways, and what the sweep of all of them says of each."""

import time

import pytest
import torch
import ways
import ways_out
from trainers import make_dpo_trainer, make_grpo_trainer
from way_models import save_way_model

REASON = "is not installed: pip install 'hf-slim[test]'"


def run(way, family, folder, shape="non-uniform"):
    """The difference on one way."""
    return way(ways.Subject(family, folder / shape, save_way_model(family, shape, folder / shape)))


def test_torch_export_takes_other_batches_and_lengths(tmp_path):
    assert run(ways.torch_export, "BERT", tmp_path) < 1e-5


def test_onnx_takes_other_batches_and_lengths(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} {REASON}")
    assert run(ways.onnx_by_torch, "BERT", tmp_path) < 1e-4


@pytest.mark.parametrize("family", ["BERT", "GPT-2", "Llama", "ViT"])
def test_pipeline(family, tmp_path):
    assert run(ways.pipeline, family, tmp_path) < 1e-6


@pytest.mark.parametrize("way", [ways.sentence_transformer, ways.cross_encoder, ways.sparse_encoder])
def test_sentence_transformers(way, tmp_path):
    pytest.importorskip("sentence_transformers", reason=f"sentence-transformers {REASON}")
    assert run(way, "BERT", tmp_path) < 1e-5


@pytest.mark.parametrize("make", [make_dpo_trainer, make_grpo_trainer])
def test_trl_slims_the_model_and_not_its_reference(make, tmp_path):
    pytest.importorskip("trl", reason=f"trl {REASON}")
    assert run(ways.by_trl(make), "GPT-2", tmp_path) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_int8_of_pytorch(tmp_path):
    assert 0 < run(ways.torch_int8, "BERT", tmp_path) < 0.2


def test_four_bits_take_multiples_of_64(tmp_path):
    pytest.importorskip("bitsandbytes", reason=f"bitsandbytes {REASON}")
    way = ways.by_quantization_config(ways.four_bits)
    with pytest.raises(AssertionError, match="N must be divisible by block_n"):
        run(way, "BERT", tmp_path)
    assert 0 < run(way, "BERT", tmp_path, "multiples of 64") < 1


# ----------------------------------------------------------------------------------------------------------- the sweep


def answer(difference):
    """A way that gives a difference by the shape, or raises it."""

    def way(subject):
        found = difference[subject.folder.name]
        if isinstance(found, Exception):
            raise found
        return found

    return way


def caused(error, cause):
    """An error that another one began."""
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("differences", "rounds", "expected"),
    [
        ({"uniform": 1e-6}, False, ("works", "1.0e-06")),
        ({"uniform": 1e-2}, False, ("refused", "off by 1.0e-02")),
        ({"uniform": 1e-2, "dense": 2e-2}, True, ("works", "1.0e-02 (dense 2.0e-02)")),
        (
            {"uniform": ValueError("\x1b[96mno /home/me/x\nmore"), "dense": 1e-6},
            False,
            ("refused", "ValueError: no ..."),
        ),
        ({"uniform": ValueError("no"), "dense": ValueError("neither")}, False, ("dense, too", "ValueError: no")),
        ({"uniform": caused(ValueError("no"), KeyError("x")), "dense": 0.0}, False, ("refused", "KeyError: 'x'")),
        ({"uniform": ways.UnsupportedError("no text")}, False, ("none", "no text")),
        ({"uniform": ImportError("no onnx")}, False, ("none", "not run here: ImportError: no onnx")),
    ],
)
def test_every_outcome_has_its_cell(differences, rounds, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(ways_out.WAYS, "way", ways_out.Way(answer(differences), rounds=rounds))
    monkeypatch.setattr(ways_out, "save_way_model", lambda family, shape, folder: torch.nn.Linear(2, 2))
    assert ways_out.try_way("way", "BERT", "uniform", tmp_path, 60.0) == expected


def test_a_cell_that_takes_too_long_says_so_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ways_out, "save_way_model", lambda family, shape, folder: torch.nn.Linear(2, 2))
    monkeypatch.setattr(ways_out, "SLOW_TO_IMPORT", ())
    found = []
    for way, limit in ((lambda subject: time.sleep(60), 1.0), (answer({"uniform": 1e-6}), 60.0), (answer({}), 60.0)):
        monkeypatch.setitem(ways_out.WAYS, "way", ways_out.Way(way, shapes=("uniform",)))
        found += ways_out.sweep(["way"], ["BERT"], tmp_path / "kept.json", limit).values()
    assert found == [("late", "not finished after 1 s"), ("works", "1.0e-06"), ("works", "1.0e-06")]


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ways_out.START}\nold\n{ways_out.END}\nafter\n", encoding="utf-8")
    cells = {("`pipeline`", family, "uniform"): ways_out.Cell("works", "1.0e-06") for family in ("BERT", "GPT-2")}
    cells["`pipeline`", "T5", "uniform"] = ways_out.Cell("none", "no pipeline")
    cells["`pipeline`", "ViT", "uniform"] = ways_out.Cell("refused", "no `x`")
    cells["`pipeline`", "ViT", "non-uniform"] = ways_out.Cell("dense, too", "no pipeline")
    ways_out.write_page(cells, page)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith(f"before\n{ways_out.START}\n| way out | sizes | BERT | GPT-2 | Llama | T5 | ViT |\n")
    assert "| `pipeline` | uniform | 1.0e-06 | 1.0e-06 | not run | none (1) | refused (2) |\n" in text
    assert "| `pipeline` | non-uniform | not run | not run | not run | not run | refused, dense too (1) |\n" in text
    assert "\n\n1. `no pipeline`\n2. `no 'x'`\n\n" in text
    assert text.endswith(f"{ways_out.END}\nafter\n")
    page.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="has no <!-- table -->"):
        ways_out.write_page(cells, page)
