"""The hf-slim command, end to end on tiny models."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import need_data
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    pipeline,
)

from hf_slim.cli import main
from hf_slim.saving.report import count_bytes, count_parameters

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "bad", "dull", "fine", "film", "play"]
POSITIONS = 16
LIVE = ("--ffn2_sparsity", "0.5", "--mha_sparsity", "0.5", "--slim_scope", "local", "--slim_round_to", "8")
SLIM = (*LIVE, "--slim_live", "False")
# Of each of the 2 layers: 2 of 4 heads, 16 wide, from query, key and value with their biases and from the output
# projection, and 32 of 64 channels from both sides.
REMOVED = 2 * (16 * 33 * 3 + 16 * 32 + 32 * 33 + 32 * 32)


def _bert_parameters(labels: int) -> int:
    embeddings = (len(SPECIAL) + len(WORDS) + POSITIONS + 2) * 32 + 64
    layer = 4 * (32 * 32 + 32) + 64 + 2 * 32 * 64 + 64 + 32 + 64
    return embeddings + 2 * layer + 32 * 32 + 32 + 33 * labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A vocabulary, a config and three data sets."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        vocab_size=len(SPECIAL) + len(WORDS),
        initializer_range=0.3,
    ).to_json_file(tmp_path / "bert.json")
    GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=16).to_json_file(tmp_path / "gpt2.json")
    reviews = [f"{opinion} {thing},{opinion in ('good', 'fine')}" for opinion in WORDS[:4] for thing in WORDS[4:]]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *reviews * 2]))
    pairs = [f"{one} film,{two} play,{float(one == two)}" for one in WORDS[:4] for two in WORDS[:4]]
    (tmp_path / "pairs.csv").write_text("\n".join(["one,two,score", *pairs]))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    return tmp_path


def _flags(folder: Path, data: str = "reviews.csv", config: str = "bert.json", **changes: object) -> list[str]:
    flags: dict[str, object] = {
        "config_name": folder / config,
        "train_file": folder / data,
        "max_seq_length": 12,
        "output_dir": folder / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 5,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    if not data.endswith(".txt"):
        flags |= {"tokenizer_name": folder / "vocab.txt", "validation_file": folder / data}
    if data == "pairs.csv":
        flags |= {"label_column": "score"}
    flags |= changes
    return [
        part for name, value in flags.items() if value is not None for part in (f"--{name}", *str(value).split("|"))
    ]


def _run(*flags: str) -> dict:
    assert main(["run", *flags]) == 0
    return json.loads((Path(flags[flags.index("--output_dir") + 1]) / "comparison.json").read_text())


def test_classification_of_words(folder, capsys):
    figures = _run(*_flags(folder), *SLIM)
    dense = _bert_parameters(labels=2)
    assert [figures[name]["parameters"] for name in ("dense", "masked", "slimmed")] == [dense, dense, dense - REMOVED]
    assert [figures[name]["bytes"] for name in ("dense", "slimmed")] == [4 * dense, 4 * (dense - REMOVED)]
    assert list(figures["dense"]["metrics"]) == ["accuracy", "loss"]
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-5)
    assert figures["dense"]["metrics"]["loss"] != figures["masked"]["metrics"]["loss"]
    assert all(figures[name]["latency_ms"] > 0 for name in ("dense", "masked", "slimmed"))

    printed = capsys.readouterr().out
    assert re.search(rf"parameters +{dense:,} +{dense:,} +{dense - REMOVED:,}\n", printed)
    assert re.search(r"\n +dense +masked +slimmed\n-+\naccuracy ", printed)
    assert printed.endswith(f"The slim model lies in {folder / 'out' / 'slim'}\n")

    model = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "slim")
    assert count_parameters(model) == dense - REMOVED
    assert (model.config.id2label, model.config.problem_type) == (
        {0: "False", 1: "True"},
        "single_label_classification",
    )
    classify = pipeline("text-classification", str(folder / "out" / "slim"))
    assert classify("good film")[0]["label"] in ("False", "True")


def test_units_that_leave_the_model_while_it_trains(folder, capsys):
    live = _run(*_flags(folder), *LIVE)
    dense = _bert_parameters(labels=2)
    assert live["masked"] is None
    assert [live[name]["parameters"] for name in ("dense", "slimmed")] == [dense, dense - REMOVED]
    assert re.search(r"\n +dense +slimmed\n-+\naccuracy ", capsys.readouterr().out)


def test_a_budget_is_for_the_slimmed_training_alone(folder):
    flags = ("--slim_target_params", "85%", "--slim_round_to", "8")
    figures = _run(*_flags(folder), *flags)
    dense, slimmed = (figures[name]["parameters"] for name in ("dense", "slimmed"))
    assert dense == _bert_parameters(2)
    assert 0.8 * dense < slimmed <= 0.85 * dense


def test_regression_of_pairs(folder):
    figures = _run(*_flags(folder, "pairs.csv"), *SLIM)
    assert list(figures["dense"]["metrics"]) == ["pearson", "spearman", "loss"]
    assert figures["dense"]["parameters"] == _bert_parameters(labels=1)
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "slim")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_language_model_of_bytes(folder):
    figures = _run(*_flags(folder, "text.txt", "gpt2.json"), *SLIM)
    for name in ("dense", "masked", "slimmed"):
        metrics = figures[name]["metrics"]
        assert list(metrics) == ["loss", "perplexity"]
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-4)

    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "slim")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "slim")
    assert (model.config.vocab_size, len(tokenizer), model.config.eos_token_id) == (257, 257, 0)
    ids = model.generate(**tokenizer("to be", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("to be")


def test_a_slim_model_is_fine_tuned_and_slimmed_again(folder):
    first = _run(*_flags(folder), *SLIM)
    weights = _flags(
        folder,
        config_name=None,
        tokenizer_name=None,
        model_name_or_path=folder / "out" / "slim",
        output_dir=folder / "again",
    )
    again = _run(*weights, *SLIM)
    assert again["dense"]["parameters"] == first["slimmed"]["parameters"]
    # Of each layer 1 of the 2 heads that were left and 16 of 32 channels.
    removed = 2 * (8 * 33 * 3 + 8 * 32 + 16 * 33 + 16 * 32)
    assert again["slimmed"]["parameters"] == first["slimmed"]["parameters"] - removed


def test_without_sparsity_both_trainings_are_the_same(folder):
    with pytest.warns(UserWarning, match="ffn2_sparsity and mha_sparsity are both 0"):
        figures = _run(*_flags(folder))
    assert figures["dense"]["metrics"] == figures["masked"]["metrics"] == figures["slimmed"]["metrics"]
    assert figures["slimmed"]["parameters"] == figures["dense"]["parameters"] == _bert_parameters(labels=2)


def test_both_trainings_go_on_from_their_checkpoints(folder):
    whole = _run(*_flags(folder, save_strategy="steps", save_steps=3), *SLIM)
    for part in ("dense", "masked"):
        shutil.rmtree(folder / "out" / part / "checkpoint-4")
    (folder / "out" / "comparison.json").unlink()
    resumed = _run(*_flags(folder, save_strategy="steps", save_steps=3, resume_from_checkpoint="true"), *SLIM)
    for name in ("dense", "masked", "slimmed"):
        assert resumed[name]["metrics"] == whole[name]["metrics"]


def test_the_dense_model_is_trained_first_to_teach_the_slimmed_one(folder):
    plain = _run(*_flags(folder), *SLIM)
    taught = _run(*_flags(folder, slim_teacher="dense", logging_steps=1, save_strategy="epoch"), *SLIM)
    assert taught["dense"] == {**plain["dense"], "latency_ms": taught["dense"]["latency_ms"]}
    assert taught["masked"]["metrics"]["loss"] != plain["masked"]["metrics"]["loss"]
    (state,) = (folder / "out" / "masked").glob("checkpoint-*/trainer_state.json")
    logged = [entry["distill_loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(logged) == 4 and logged[0] > 0
    (state,) = (folder / "out" / "dense").glob("checkpoint-*/trainer_state.json")
    assert not any("distill_loss" in entry for entry in json.loads(state.read_text())["log_history"])


def test_a_run_goes_on_with_its_dense_teacher(folder):
    flags = _flags(folder, save_strategy="steps", save_steps=3, slim_teacher="dense")
    whole = _run(*flags, *SLIM)
    for part in ("dense", "masked"):
        shutil.rmtree(folder / "out" / part / "checkpoint-4")
    resumed = _run(*flags, "--resume_from_checkpoint", "true", *SLIM)
    for name in ("dense", "masked", "slimmed"):
        assert resumed[name]["metrics"] == whole[name]["metrics"]


def test_a_run_learns_from_a_folder(folder):
    _run(*_flags(folder), *SLIM)
    figures = _run(*_flags(folder, slim_teacher=folder / "out" / "slim", output_dir=folder / "taught"), *SLIM)
    assert figures["dense"]["metrics"] != figures["masked"]["metrics"]


def test_the_best_model_is_one_at_the_target_sparsity(folder):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    figures = _run(*_flags(folder, save_strategy="steps", save_steps=1, slim_start=2, slim_end=3, **best), *SLIM)
    assert figures["slimmed"]["parameters"] == _bert_parameters(labels=2) - REMOVED
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-5)


def test_a_json_file_of_arguments(folder):
    flags = [*_flags(folder, "pairs.csv"), *LIVE]
    expected = _run(*flags)
    arguments = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    numbers = ("max_steps", "max_seq_length", "per_device_train_batch_size", "per_device_eval_batch_size")
    numbers += ("ffn2_sparsity", "mha_sparsity", "slim_round_to")
    arguments |= {name: json.loads(arguments[name]) for name in numbers}
    arguments |= {"use_cpu": True, "text_column": ["one", "two"], "output_dir": str(folder / "json")}
    (folder / "arguments.json").write_text(json.dumps(arguments))
    assert main(["run", str(folder / "arguments.json")]) == 0
    figures = json.loads((folder / "json" / "comparison.json").read_text())
    assert [figures[name]["metrics"] for name in ("dense", "slimmed")] == [
        expected[name]["metrics"] for name in ("dense", "slimmed")
    ]


def test_a_tokenizer_larger_than_a_fresh_config_widens_it(folder):
    config = json.loads((folder / "bert.json").read_text())
    (folder / "narrow.json").write_text(json.dumps(config | {"vocab_size": 7}))
    assert _run(*_flags(folder, config="narrow.json"), *SLIM)["dense"]["parameters"] == _bert_parameters(labels=2)


def test_the_saved_tokenizer_knows_how_long_a_text_may_be(folder):
    _run(*_flags(folder), *SLIM)
    assert AutoTokenizer.from_pretrained(folder / "out" / "slim").model_max_length == POSITIONS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_name": None}, "Give one of --model_name_or_path .* and --config_name .*, got neither"),
        ({"model_name_or_path": "google-bert/bert-base-uncased"}, "Give one of .*, got both"),
        ({"config_name": "./nowhere"}, r"--config_name: there is no file or folder \./nowhere"),
        ({"tokenizer_name": "nowhere.txt"}, r"--tokenizer_name: there is no file or folder nowhere\.txt"),
        (
            {"config_name": None, "model_name_or_path": "/no/model"},
            "--model_name_or_path: there is no file or folder /no",
        ),
        ({"tokenizer_name": None}, r"There is no tokenizer in .*bert\.json: name one by --tokenizer_name"),
        ({"max_seq_length": 17}, "--max_seq_length 17 is more than the model takes, 16"),
        ({"train_file": "nowhere.csv"}, r"There is no file nowhere\.csv"),
        ({"label_column": "stars"}, r"reviews\.csv has no column 'stars'; it has text, label"),
        ({"ffn2_sparsity": "1.0"}, r"ffn2_sparsity must be in \[0, 1\), got 1\.0"),
        ({"slim_start": "0.6"}, r"slim_start must not be after slim_end, got slim_start=0\.6, slim_end=0\.3"),
        ({"slim_end": "5", "ffn2_sparsity": "0.5"}, "slim_end=5 is beyond the last training step, 4"),
        ({"slim_exclude": "nothing.like.that", "ffn2_sparsity": "0.5"}, "nothing.like.that"),
        ({"mha_sparsity": "0.9"}, "mha_sparsity"),
        (
            {"resume_from_checkpoint": "out/checkpoint-2"},
            "--resume_from_checkpoint must be true, got 'out/checkpoint-2'",
        ),
        ({"no_such_flag": "1"}, "no_such_flag"),
    ],
)
def test_bad_input_is_refused_before_training(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        main(["run", *_flags(folder, **changes)])
    written = [path for path in (folder / "out").rglob("*") if not path.is_dir()]
    assert written == []


def test_an_output_dir_that_is_a_file_is_refused(folder):
    with pytest.raises(ValueError, match=r"--output_dir .*reviews\.csv is a file; name a folder"):
        main(["run", *_flags(folder, output_dir=folder / "reviews.csv")])


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(folder):
    _run(*_flags(folder), *SLIM)
    (folder / "large.txt").write_text("\n".join([*SPECIAL, *WORDS, "more"]))
    flags = _flags(
        folder, config_name=None, model_name_or_path=folder / "out" / "slim", tokenizer_name=folder / "large.txt"
    )
    with pytest.raises(ValueError, match=r"large\.txt has 12 tokens, but the model knows only 11"):
        main(["run", *flags])


def test_unknown_labels_are_refused_before_training(folder):
    (folder / "other.csv").write_text("text,label\ngood film,True\nbad film,Perhaps\n")
    with pytest.raises(ValueError, match=r"other\.csv: the labels .*Perhaps.* do not occur in the training data"):
        main(["run", *_flags(folder, validation_file=folder / "other.csv")])


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["run", "--help"], 0), ([], 2), (["train"], 2)])
def test_usage(argv, status, capsys):
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == status
    captured = capsys.readouterr()
    assert "hf-slim" in captured.out + captured.err


def test_help_lists_flags_of_every_kind(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    printed = capsys.readouterr().out
    for flag in ("--model_name_or_path", "--train_file", "--task", "--learning_rate", "--ffn2_sparsity"):
        assert flag in printed


@pytest.mark.slow
def test_trec_slimmed_is_as_good_as_dense(tmp_path):
    trec, vocabulary = need_data("trec"), need_data("bert-vocab") / "vocab.txt"
    BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, max_position_embeddings=64
    ).to_json_file(tmp_path / "config.json")
    figures = _run(
        *("--config_name", str(tmp_path / "config.json"), "--tokenizer_name", str(vocabulary)),
        *("--train_file", str(trec / "train.csv"), "--validation_file", str(trec / "test.csv")),
        *("--max_seq_length", "40", "--num_train_epochs", "10", "--per_device_train_batch_size", "32"),
        *("--learning_rate", "5e-4", "--warmup_steps", "0.1", "--weight_decay", "0.01", "--save_strategy", "no"),
        *("--ffn2_sparsity", "0.5", "--mha_sparsity", "0.5", "--output_dir", str(tmp_path / "out")),
    )
    dense, slimmed = (figures[name]["metrics"]["accuracy"] for name in ("dense", "slimmed"))
    assert dense >= 0.80
    assert slimmed >= dense - 0.01


def test_slim_bytes_are_those_of_the_file(folder):
    figures = _run(*_flags(folder), *SLIM)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "slim")
    assert figures["slimmed"]["bytes"] == count_bytes(model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
