"""In whatever order a model is slimmed, loaded and saved, its report begins with what it was at first."""

import copy
import json

import pytest
from conftest import build, half_masks
from sparse_models import Holder, masked
from trainers import make_trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_slim import SlimConfig, find_structures, model_slim, save_slimmed, slim
from hf_slim.compaction.zeros import zero_units
from hf_slim.saving.past_slimming import find_past

DENSE = 37890  # parameters of the tiny BERT, whose halves are 64 channels and 4 heads
HALF = 37890 - 2 * (32 * 65 + 2 * 1048)
ROWS = [{"input_ids": [5 + row, 6, 7, 8]} for row in range(16)]
HALVES = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "slim_scope": "local", "slim_round_to": 1}


def sizes(report):
    """How many units of each kind there were and are."""
    return [
        tuple(sum(getattr(s, when) for s in report.structures if s.kind == kind) for when in ("before", "after"))
        for kind in ("ffn", "mha")
    ]


def halve(model):
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))


def by_slim(model, tmp_path):
    slim(model, ROWS, SlimConfig(**HALVES), num_calibration_samples=16)
    return model


def by_model_slim(model, tmp_path):
    halve(model)
    return model_slim(model, 1)


def by_training(model, tmp_path):
    trainer = make_trainer(model, tmp_path / "out", slim_live=True, **HALVES)
    trainer.train()
    return copy.deepcopy(model)  # which knows nothing of the training


def by_save(model, tmp_path):
    halve(model)
    save_slimmed(model, tmp_path / "first", inplace=True)
    return model


def by_loading(model, tmp_path):
    halve(model)
    save_slimmed(model, tmp_path / "first")
    (tmp_path / "first" / "slim_report.json").unlink()
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")


WAYS = [by_slim, by_model_slim, by_training, by_save, by_loading]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_slim_before_it_is_saved(way, tmp_path):
    report = save_slimmed(way(build("bert"), tmp_path), tmp_path / "slim")
    assert sizes(report) == [(128, 64), (8, 4)]
    assert (report.parameters_before, report.parameters_after) == (DENSE, HALF)
    assert report.bytes_before - report.bytes_after == 4 * (DENSE - HALF)
    assert report.flops_before > report.flops_after and report.milliseconds_before
    assert report.unproven == ()
    text = (tmp_path / "slim" / "README.md").read_text()
    assert "slimmed to 78% of the parameters of the dense model" in text
    assert "| parameters | 37,890 | 29,538 | -22% |" in text
    assert json.loads((tmp_path / "slim" / "slim_report.json").read_text())["report"]["parameters_before"] == DENSE


@pytest.mark.parametrize("way", [by_slim, by_training, by_loading])
def test_what_is_slimmed_further(way, tmp_path):
    model = way(build("bert"), tmp_path)
    slim(model, ROWS, SlimConfig(**HALVES), num_calibration_samples=16)
    for _ in range(2):  # saving says nothing else the second time
        assert sizes(save_slimmed(model, tmp_path / "slim", verify=False)) == [(128, 32), (8, 2)]


def test_what_slim_was_asked_for_is_told(tmp_path):
    model = build("bert")
    report = slim(model, ROWS, SlimConfig(slim_target_params=0.8), num_calibration_samples=16, method="magnitude")
    assert save_slimmed(model, tmp_path).budget == report.budget is not None
    text = (tmp_path / "README.md").read_text()
    assert '| `method` | `"magnitude"` |\n| `slim_target_params` | `0.8` |\n' in text
    assert f"Budget: {report.budget}." in text
    halve(model)
    assert save_slimmed(model, tmp_path).budget is None  # it is smaller now


def test_what_was_never_proven_stays_so(tmp_path):
    model = model_slim(masked(), 1, verify=False)
    names = tuple(s.name for s in find_structures(model).structures)
    assert save_slimmed(model, tmp_path / "one").unproven == names
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert save_slimmed(loaded, tmp_path / "two").unproven == names


def test_what_was_proven_with_a_copy_is_proven(tmp_path):
    model = masked()
    save_slimmed(model, tmp_path, inplace=True)
    assert save_slimmed(model, tmp_path).unproven == ()


@pytest.fixture
def stock(tmp_path):
    """A slim Llama whose config says the sizes by fields, and what its report says."""
    return tmp_path / "stock", save_slimmed(masked("llama"), tmp_path / "stock")


def test_a_stock_model_is_what_the_report_beside_it_says(stock, tmp_path):
    folder, first = stock
    model = AutoModelForCausalLM.from_pretrained(folder)
    again = save_slimmed(model, tmp_path / "again")
    assert again == first and again.machine == first.machine
    halve(model)
    further = save_slimmed(model, tmp_path / "further")
    assert [s.before for s in further.structures] == [s.before for s in first.structures]
    assert [s.after for s in further.structures if s.kind == "mha"] == [1, 1]
    assert further.parameters_before == first.parameters_before and further.bytes_before == first.bytes_before
    assert further.flops_before == first.flops_before and further.flops_after < first.flops_after
    assert further.milliseconds_before is None
    why = "The latency of the model before is not known: it was smaller already when it was loaded."
    assert further.missing == why and why in (tmp_path / "further" / "README.md").read_text()


def test_a_stock_model_without_a_report_is_what_was_loaded(stock, tmp_path):
    folder, first = stock
    (folder / "slim_report.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder)
    halve(model)
    assert save_slimmed(model, tmp_path / "again").parameters_before == first.parameters_after


def test_a_report_of_other_weights_or_none_that_can_be_read_says_nothing(stock):
    folder, _ = stock
    for change in (lambda text: text.replace('"parameters_after": ', '"parameters_after": 1'), lambda _: "{"):
        path = folder / "slim_report.json"
        path.write_text(change(path.read_text()))
        assert find_past(AutoModelForCausalLM.from_pretrained(folder))[1].loaded is None


def test_in_a_module_around_it_the_names_are_longer(stock, tmp_path):
    folder, first = stock
    holder = Holder(AutoModelForCausalLM.from_pretrained(folder))
    report = save_slimmed(holder, tmp_path / "held", verify=False)
    assert [s.before for s in report.structures] == [s.before for s in first.structures]
    assert report.parameters_before == first.parameters_before and report.structures[0].name.startswith("model.model")


def test_what_it_was_made_from_is_told_of_a_folder_that_says_so(tmp_path):
    model = masked()
    model.config.name_or_path = "google/bert"
    save_slimmed(model, tmp_path / "one", verify=False)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    save_slimmed(loaded, tmp_path / "two", verify=False)
    assert (
        "\n[google/bert](https://huggingface.co/google/bert) slimmed to 78%"
        in (tmp_path / "two" / "README.md").read_text()
    )
