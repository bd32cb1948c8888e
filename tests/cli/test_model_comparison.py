"""What `hf-slim compare` says of two models, and which two it refuses."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import build, half_masks
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, PreTrainedModel

from hf_slim import find_structures, model_slim
from hf_slim.cli.model_comparison import CompareArguments, compare_models
from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.compaction import zero_units
from hf_slim.saving import count_bytes, count_parameters

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "play"]


def save_both(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with half of its units zero, and the same without them, in `masked` and `slim`."""
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    slim = model_slim(copy.deepcopy(model), round_multiplier=1)
    for name, each in (("masked", model), ("slim", slim)):
        each.save_pretrained(folder / name)
    return model, slim


def compare(folder: Path, one: str = "masked", other: str = "slim", **keywords: object):
    return compare_models(CompareArguments(str(folder / one), str(folder / other), **keywords))


def make_bert(labels: tuple[str, ...] = ("neg", "pos"), words: list[str] = WORDS) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            id2label=dict(enumerate(labels)),
            label2id={name: number for number, name in enumerate(labels)},
            initializer_range=0.5,
            **sizes,
        )
    ).eval()


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "vit", "bart"])
def test_a_masked_model_and_the_slim_one(family, tmp_path):
    models = save_both(build(family), tmp_path)
    found = compare(tmp_path)
    for figures, model in zip((found.first, found.second), models, strict=True):
        assert figures.architecture == type(model).__name__
        assert (figures.parameters, figures.bytes) == (count_parameters(model), count_bytes(model))
        assert figures.metrics == {}
        assert figures.latency_ms > 0
        sizes = {s.name: s.units for s in find_structures(model).structures}
        assert {n: u for g in figures.structures for n, u in zip(g.names, g.units, strict=True)} == sizes
    assert found.second.flops < found.first.flops
    assert found.outputs[0].name == "logits"
    assert all(output.relative < 1e-4 for output in found.outputs)
    json.dumps(found.to_dict())


def test_it_prints_tables(tmp_path, monkeypatch):
    one, other = save_both(build("bert"), tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = str(compare(Path())).splitlines()
    names = [(line.split() or [""])[0] for line in lines]
    assert lines[0].split() == ["masked", "slim", "change"]
    assert names[2:7] == ["class", "parameters", "megabytes", "FLOPs", "latency"]
    before, after = count_parameters(one), count_parameters(other)
    assert lines[3].split() == ["parameters", f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.1f}%"]
    assert lines[names.index("bert.encoder.layer.*.output.dense")].split()[1:] == ["ffn", *"2 x 64 2 x 32".split()]
    assert lines[-1] == "Outputs, FLOPs and latency: a forward pass on input_ids (1, 128)"


def test_outputs_that_differ_are_measured(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "masked")
    with torch.no_grad():
        model.classifier.bias += torch.tensor([0.0, 0.5])
    model.save_pretrained(tmp_path / "slim")
    (output,) = compare(tmp_path).outputs
    assert output.absolute == pytest.approx(0.5, rel=1e-5)
    assert compare(tmp_path, "masked", "masked").outputs[0].absolute == 0


def test_the_metric_of_a_file_by_the_labels_of_the_model(tmp_path, capsys):
    model, _ = save_both(make_bert(), tmp_path)
    save_tokenizer(tmp_path / "masked")
    texts = ["good film", "bad play", "good play bad", "film"]
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "masked")
    guesses = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    # In the file pos comes alone or first, so that its number cannot be that of the order of the labels.
    rows = [f"{text},{model.config.id2label[guess]}" for text, guess in zip(texts, guesses, strict=True)]
    (tmp_path / "all.csv").write_text("\n".join(["text,label", *rows]))
    found = compare(tmp_path, validation_file=str(tmp_path / "all.csv"))
    assert found.first.metrics["accuracy"] == 1
    assert found.second.metrics == pytest.approx(found.first.metrics, rel=1e-4)
    assert list(found.first.metrics) == ["accuracy", "loss"]
    assert capsys.readouterr().out == ""  # the trainer is quiet
    assert found.computed_on.startswith("input_ids (4, ")
    assert "\naccuracy " in str(found)

    numbers = "\n".join(["text,label", *(f"{text},{guess}" for text, guess in zip(texts, guesses, strict=True))])
    (tmp_path / "numbers.csv").write_text(numbers)
    assert compare(tmp_path, validation_file=str(tmp_path / "numbers.csv")).first.metrics["accuracy"] == 1

    (tmp_path / "pos.csv").write_text("text,label\ngood film,pos\nbad film,pos\n")
    share = sum(int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in ("good film", "bad film")) / 2
    found = compare(tmp_path, validation_file=str(tmp_path / "pos.csv"))
    assert found.first.metrics["accuracy"] == share


def test_the_perplexity_of_a_language_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_byte_tokenizer()
    save_both(build("gpt2", vocab_size=len(tokenizer)), tmp_path)
    tokenizer.save_pretrained(tmp_path / "masked")
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 20)
    found = compare(tmp_path, validation_file=str(tmp_path / "text.txt"), max_seq_length=32)
    assert list(found.first.metrics) == ["loss", "perplexity"]
    assert found.second.metrics == pytest.approx(found.first.metrics, rel=1e-3)
    assert found.computed_on == "input_ids (8, 32), attention_mask (8, 32)"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: build("bert", vocab_size=98), r"different vocabularies \(vocab_size\), 99 and 98"),
        (lambda: build("bert", num_labels=5), "different numbers of labels, 2 and 5"),
        (lambda: build("roberta"), "different tasks, the one is a BertForSequenceClassification, the other a Roberta"),
        (lambda: build("gpt2"), "different tasks, .* the other a GPT2LMHeadModel"),
    ],
)
def test_models_that_do_not_compare(other, message, tmp_path):
    build("bert").save_pretrained(tmp_path / "masked")
    other().save_pretrained(tmp_path / "slim")
    with pytest.raises(ValueError, match=f"masked and .*slim do not compare: they have|they do {message}") as caught:
        compare(tmp_path)
    with pytest.raises(ValueError, match=message):
        compare(tmp_path)
    assert "\n" not in str(caught.value)


def test_models_of_several_classes_with_one_task_compare(tmp_path):
    build("llama").save_pretrained(tmp_path / "masked")
    build("gpt2").save_pretrained(tmp_path / "slim")
    found = compare(tmp_path)
    assert [output.name for output in found.outputs] == ["logits"]
    assert "model.layers.*.mlp.down_proj" in str(found) and "transformer.h.*.mlp.c_proj" in str(found)


def test_base_models_with_other_widths_have_nothing_to_compare(tmp_path):
    for name, width in (("masked", 32), ("slim", 64)):
        build("bert", hidden_size=width).bert.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"do not compare: their outputs are last_hidden_state \(1, \d+, 32\), "):
        compare(tmp_path)


def test_a_model_that_does_not_run_on_the_inputs_of_the_other(tmp_path):
    build("vit").save_pretrained(tmp_path / "masked")
    build("vit", image_size=32).save_pretrained(tmp_path / "slim")
    message = r"slim, a ViTForImageClassification, does not run on pixel_values \(1, 3, 16, 16\): "
    with pytest.raises(ValueError, match=message):
        compare(tmp_path)


@pytest.mark.parametrize(
    ("rows", "keywords", "message"),
    [
        ("text,label\ngood,new\n", {}, "The label 'new' of the file is none of the model, which has neg, pos"),
        (
            "text,label\ngood,pos\n",
            {"max_seq_length": 1000},
            "--max_seq_length 1000 is more than the model takes, 512",
        ),
        ("text,other\ngood,pos\n", {}, "classification needs labels: name the --label_column"),
        (None, {}, "There is no file "),
    ],
)
def test_a_file_that_does_not_fit(rows, keywords, message, tmp_path):
    save_both(make_bert(), tmp_path)
    save_tokenizer(tmp_path / "masked")
    if rows is not None:
        (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(ValueError, match=message) as caught:
        compare(tmp_path, validation_file=str(tmp_path / "rows.csv"), **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "^--batch_size must be a whole number from 1, got 0"),
        ({"batch_size": 4}, "^--batch_size is about the rows of a file: name one by --validation_file"),
        ({"max_seq_length": 0}, "^--max_seq_length is about the rows of a file: name one by --validation_file"),
        ({"text_column": ["text"]}, "^--text_column is about the rows of a file: name one by --validation_file"),
    ],
)
def test_flags_that_do_not_fit(keywords, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, **keywords)


def test_tokenizers_are_one_or_named(tmp_path):
    save_both(make_bert(), tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\ngood,pos\n")
    with pytest.raises(ValueError, match="There is no tokenizer in .*masked or .*slim: name one by --tokenizer_name"):
        compare(tmp_path, validation_file=str(rows))
    save_tokenizer(tmp_path / "masked")
    save_tokenizer(tmp_path / "slim", [*WORDS[:5], *reversed(WORDS[5:])])
    with pytest.raises(ValueError, match="their tokenizers have different vocabularies, 'good' is 5 and 8"):
        compare(tmp_path, validation_file=str(rows))
    compare(tmp_path, validation_file=str(rows), tokenizer_name=str(tmp_path / "masked"))


def test_a_task_without_metrics(tmp_path):
    save_both(build("vit"), tmp_path)
    with pytest.raises(ValueError, match="none for ViTForImageClassification: leave out --validation_file"):
        compare(tmp_path, validation_file="rows.csv")
