"""hf-slim card: the card of a slim model, written anew from its folder."""

import json

import pytest
from commands import refuse
from conftest import build
from sparse_models import masked

from hf_slim import save_slimmed
from hf_slim.cli import main


@pytest.fixture
def slim(tmp_path):
    """The folder of a slim model."""
    save_slimmed(masked(), tmp_path / "slim")
    return tmp_path / "slim"


def test_a_card_says_what_it_said_when_the_model_was_saved(slim, capsys):
    card = slim / "README.md"
    first = card.read_text()
    assert "| `bert.encoder.layer.0.attention.output.dense` | mha | 4 | 2 |" in first
    card.unlink()
    assert main(["card", str(slim)]) == 0
    assert capsys.readouterr().out == f"\nThe model card lies in {card}\n"
    assert card.read_text() == first
    assert not any(path.name.startswith(".") for path in slim.iterdir())


def test_a_card_is_renewed_with_its_evaluation_and_the_name_of_its_repository(slim):
    card = slim / "README.md"
    results = "- task: {type: text-classification}\n    dataset: {type: unknown, name: Unknown}\n"
    results += "    metrics: [{type: accuracy, value: 0.75}]\n"
    index = f"model-index:\n- name: tiny\n  results:\n  {results}"
    text = card.read_text().replace('("slim")', '("me/tiny")').replace("---\n", f"---\n{index}", 1)
    card.write_text(text.replace("ffn | 64 | 32", "ffn | 7 | 7"))
    assert main(["card", str(slim)]) == 0
    renewed = card.read_text()
    assert 'from_pretrained("me/tiny")' in renewed
    assert "| eval_accuracy | 0.7500 |" in renewed
    assert "ffn | 64 | 32" in renewed and "ffn | 7 | 7" not in renewed


def test_what_somebody_else_wrote_in_the_card_stays(slim):
    card = slim / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n\nWords.\n")
    (slim / "config.json").write_text(json.dumps({**json.loads((slim / "config.json").read_text())}))
    assert main(["card", str(slim)]) == 0
    assert main(["card", str(slim)]) == 0
    text = card.read_text()
    assert "license: mit" in text and text.count("# Mine") == text.count("# Slimmed with hf_slim") == 1


def test_of_a_stock_config_the_base_model_says_what_it_was(slim, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    config = json.loads((slim / "config.json").read_text())
    stock = masked(intermediate_size=32)
    stock.save_pretrained(slim)
    assert "hf_slim" not in json.loads((slim / "config.json").read_text()) and "hf_slim" in config
    assert "does not say what the model was before it was slimmed" in refuse("card", slim)
    card = slim / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\nbase_model: {tmp_path / 'base'}\n", 1))
    assert main(["card", str(slim)]) == 0
    assert "| `bert.encoder.layer.0.output.dense` | ffn | 64 | 32 |" in card.read_text()
