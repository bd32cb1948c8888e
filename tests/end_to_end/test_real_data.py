"""The main job on real data; minutes long, so run it with `pytest -m slow`."""

import pytest
from benchmarks.real_data import run
from conftest import DATA, need_data


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("sparsities", [("0.5", "0.5")])
def test_trec(sparsities):
    need_data("trec"), need_data("bert-vocab")
    models = run("trec", str(DATA), "42", *sparsities)
    accuracy = {name: models[name]["metrics"]["accuracy"] for name in models if name != "slim_model"}
    assert accuracy["dense"] >= 0.80
    assert accuracy["slimmed"] >= accuracy["dense"] - 0.01
    assert accuracy["slimmed"] == accuracy["masked"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("recipe", ["gpt2", "llama"])
def test_tiny_shakespeare(recipe):
    """A slim language model is far better than the loss of single letters, and does what the masked one did."""
    need_data("tinyshakespeare")
    models = run(recipe, str(DATA), "42", "0.5", "0.5", ["--max_steps", "300"])
    loss = {name: models[name]["metrics"]["loss"] for name in models if name != "slim_model"}
    assert loss["slimmed"] == pytest.approx(loss["masked"], abs=1e-5)
    assert loss["dense"] < 2.5 and loss["slimmed"] < 2.5
