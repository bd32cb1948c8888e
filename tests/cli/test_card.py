"""hf-slim card: the card of a slim model, written anew from its folder."""

import pytest
from commands import refuse
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
    assert "bert.encoder.layer.0.attention.output.dense" in first
    card.unlink()
    assert main(["card", str(slim)]) == 0
    assert capsys.readouterr().out == f"\nThe model card lies in {card}\n"
    assert card.read_text() == first
    assert not any(path.name.startswith(".") for path in slim.iterdir())


def test_what_somebody_else_wrote_in_the_card_stays(slim):
    card = slim / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n\nWords.\n")
    assert main(["card", str(slim)]) == 0
    assert main(["card", str(slim)]) == 0
    text = card.read_text()
    assert "license: mit" in text and text.count("# Mine") == text.count("# Slimmed with hf_slim") == 1


@pytest.mark.parametrize("command", [["card"], ["push"]])
def test_a_folder_that_holds_no_slim_model_is_refused(slim, tmp_path, command):
    repo = ["me/tiny"] if command == ["push"] else []
    nowhere = tmp_path / "nowhere"
    assert refuse(*command, nowhere, *repo) == f"There is no folder {nowhere}: name the folder of a slim model."
    nowhere.mkdir()
    assert refuse(*command, nowhere, *repo).startswith(
        f"{nowhere} holds no slim_report.json, so it was not written by save_slimmed"
    )

    (slim / "slim_report.json").write_text("{")
    assert f"{slim / 'slim_report.json'} cannot be read: " in refuse(*command, slim, *repo)
