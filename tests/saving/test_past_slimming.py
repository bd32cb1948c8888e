"""In whatever order a model is slimmed, loaded and saved, its report begins with what it was at first."""

import copy
import json

import pytest
import torch
from conftest import build, half_masks
from sparse_models import Holder, masked
from trainers import make_trainer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_slim import SlimConfig, SlimReport, find_structures, model_slim, save_slimmed, slim
from hf_slim.compaction.zeros import zero_units
from hf_slim.saving.past_slimming import find_past
from hf_slim.saving.report import SLIM_ALREADY

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


def test_a_report_that_cannot_be_read_says_nothing(stock):
    folder, _ = stock
    (folder / "slim_report.json").write_text("{")
    assert find_past(AutoModelForCausalLM.from_pretrained(folder))[1].loaded is None


def is_said(folder, report, caplog):
    """Whether the card, the report and a warning say that the model begins with what was loaded."""
    card = (folder / "README.md").read_text()
    said = {
        SLIM_ALREADY in report.missing,
        SLIM_ALREADY in str(report),
        SLIM_ALREADY in card,
        "of the parameters of the model as it was loaded:" in card,
        "of the parameters of the dense model:" not in card,
        SLIM_ALREADY in SlimReport.from_dict(json.loads((folder / "slim_report.json").read_text())).missing,
        [record.getMessage() for record in caplog.records].count(f"save_slimmed: {SLIM_ALREADY}") == 1,
    }
    caplog.clear()
    assert len(said) == 1, "some say it, some do not"
    return said.pop()


def save(model, folder):
    return save_slimmed(model, folder, verify=False)


def test_a_report_of_other_weights_is_not_believed(stock, tmp_path, caplog):
    folder, first = stock
    path = folder / "slim_report.json"
    path.write_text(path.read_text().replace('"parameters_after": ', '"parameters_after": 1'))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert find_past(loaded)[1].settings == {} and find_past(loaded)[1].parameters is None
    report = save(loaded, tmp_path / "again")
    assert is_said(tmp_path / "again", report, caplog)
    assert report.parameters_before == report.parameters_after == first.parameters_after


@pytest.fixture
def stock_bert(tmp_path):
    """A slim BERT with a head whose config says the sizes by fields, and what its report says."""
    return tmp_path / "stock", save_slimmed(masked_channels(build("bert")), tmp_path / "stock")


def masked_channels(model, keep=lambda structure: structure.units // 2):
    """The model with a part of its channels zero."""
    structures = [s for s in find_structures(model).structures if s.kind == "ffn"]
    zero_units(model, structures, half_masks(structures, keep=keep))
    return model


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForTokenClassification])
def test_with_another_head_or_none_the_model_begins_with_that_head(stock_bert, auto_class, tmp_path, caplog):
    folder, first = stock_bert
    loaded = auto_class.from_pretrained(folder)
    dense = sum(p.numel() for p in auto_class.from_config(build("bert").config).parameters())
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        report = save(loaded.to(dtype), tmp_path / "again")
        assert not is_said(tmp_path / "again", report, caplog)
        assert (report.parameters_before, report.bytes_before) == (dense, dense * width)
        assert report.parameters_before - report.parameters_after == first.parameters_before - first.parameters_after
        assert sizes(report) == sizes(first) == [(128, 64), (8, 8)]


def test_an_encoder_that_gets_a_head_begins_with_the_head(tmp_path, caplog):
    save(masked_channels(AutoModel.from_config(build("bert").config)), tmp_path / "stock")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    report = save(loaded, tmp_path / "again")
    assert report.parameters_before == DENSE and sizes(report) == [(128, 64), (8, 8)]
    assert not is_said(tmp_path / "again", report, caplog)


def test_of_a_model_that_loses_layers_it_is_said_that_it_was_slim(stock_bert, tmp_path, caplog):
    loaded = AutoModelForSequenceClassification.from_pretrained(stock_bert[0])
    del loaded.bert.encoder.layer[1]
    loaded.config.num_hidden_layers = 1
    report = save(loaded, tmp_path / "one")
    assert is_said(tmp_path / "one", report, caplog) and report.parameters_before == report.parameters_after
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert is_said(tmp_path / "two", save(again, tmp_path / "two"), caplog)  # it is not forgotten
    further = save(model_slim(masked_channels(again), 1), tmp_path / "three")
    assert further.parameters_before == report.parameters_after > further.parameters_after
    assert is_said(tmp_path / "three", further, caplog)


def test_a_stock_model_slimmed_to_several_sizes_is_what_it_was_at_first(stock_bert, tmp_path, caplog):
    folder, first = stock_bert
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    uneven = masked_channels(loaded, keep=lambda s: 24 if ".0." in s.name else 16)
    second = save_slimmed(model_slim(uneven, 1), tmp_path / "uneven")
    for way in ("three", "four"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "uneven")
        assert save_slimmed(again, tmp_path / way) == second
    assert sizes(second) == [(128, 40), (8, 8)] and second.parameters_before == DENSE == first.parameters_before
    assert (second.bytes_before, second.flops_before) == (first.bytes_before, first.flops_before)
    further = save(model_slim(masked_channels(again, keep=lambda s: 8), 1), tmp_path / "five")
    assert sizes(further) == [(128, 16), (8, 8)] and further.parameters_before == DENSE
    assert not is_said(tmp_path / "five", further, caplog)


@pytest.mark.parametrize("kinds", [("mha",), ("ffn", "mha")])
def test_of_one_group_left_in_every_layer_it_is_said_that_it_was_slim(kinds, tmp_path, caplog):
    model = build("llama", num_attention_heads=4, num_key_value_heads=2)
    structures = [s for s in find_structures(model).structures if s.kind in kinds]
    zero_units(model, structures, half_masks(structures))
    first = save(model, tmp_path / "stock")
    assert {(s.before, s.after) for s in first.structures if s.kind == "mha"} == {(2, 1)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    report = save(loaded, tmp_path / "again")
    assert is_said(tmp_path / "again", report, caplog)
    assert report.parameters_before == report.parameters_after == first.parameters_after


def test_of_what_was_never_slim_nothing_is_said(stock_bert, tmp_path, caplog):
    folder, _ = stock_bert
    build("bert").save_pretrained(folder)  # the report is of other weights now
    save(masked(), tmp_path / "record")
    save(build("bert"), tmp_path / "dense")
    for number, source in enumerate((folder, tmp_path / "record", tmp_path / "dense")):
        loaded = AutoModelForSequenceClassification.from_pretrained(source)
        if number:
            del loaded.bert.encoder.layer[1]
        report = save(loaded, tmp_path / "again")
        assert report.missing == "Operations and latency are not known: nothing was run (verify=False)." or print(
            report.missing
        )
        assert not is_said(tmp_path / "again", report, caplog)


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
