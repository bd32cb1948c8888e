"""hf-slim run, end to end on tiny models. Runs that several tests look at are made once."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import refuse, run
from conftest import need_data
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, configs and three data sets."""
    tmp_path = tmp_path_factory.mktemp("files")
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
    config = json.loads((tmp_path / "bert.json").read_text())
    (tmp_path / "narrow.json").write_text(json.dumps(config | {"vocab_size": 7}))
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


class Run(NamedTuple):
    """A run that is over: its folder, what it was told, measured and printed, and where it was started."""

    out: Path
    flags: list[str]
    figures: dict
    printed: str
    started_in: Path

    def resume(self, to: Path) -> dict:
        """What the run measures that goes on in a copy of the folder, without the last checkpoints."""
        shutil.copytree(self.out, to)
        for part in ("dense", "slimmed"):
            shutil.rmtree(to / part / "checkpoint-4")
        (to / "comparison.json").unlink()
        flags = [str(to) if word == str(self.out) else word for word in self.flags]
        return run(*flags, "--resume_from_checkpoint", "true")[0]


def _start(folder: Path, name: str, *flags: str, data: str = "reviews.csv", **changes: object) -> Run:
    words = [*_flags(folder, data, output_dir=folder / name, **changes), *flags]
    started_in = folder / f"from-{name}"
    started_in.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(started_in)
        return Run(folder / name, words, *run(*words), started_in)


KEPT = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}


@pytest.fixture(scope="module")
def words(folder: Path) -> Run:
    """A classifier of words, which keeps checkpoints and logs."""
    return _start(folder, "words", *SLIM, **KEPT, report_to="tensorboard")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Run:
    """A regression of pairs."""
    return _start(folder, "pairs", *SLIM, data="pairs.csv")


@pytest.fixture(scope="module")
def taught(folder: Path) -> Run:
    """A classifier of words that the dense one teaches."""
    return _start(folder, "taught", *SLIM, **KEPT, slim_teacher="dense")


def test_classification_of_words(words):
    figures, dense = words.figures, _bert_parameters(labels=2)
    assert [figures[name]["parameters"] for name in ("dense", "masked", "slimmed")] == [dense, dense, dense - REMOVED]
    assert [figures[name]["bytes"] for name in ("dense", "slimmed")] == [4 * dense, 4 * (dense - REMOVED)]
    assert list(figures["dense"]["metrics"]) == ["accuracy", "loss"]
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-5)
    assert figures["dense"]["metrics"]["loss"] != figures["masked"]["metrics"]["loss"]
    assert all(figures[name]["latency_ms"] > 0 for name in ("dense", "masked", "slimmed"))

    slim = words.out / "slim"
    model = AutoModelForSequenceClassification.from_pretrained(slim)
    assert count_parameters(model) == dense - REMOVED
    assert figures["slimmed"]["bytes"] == count_bytes(model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (model.config.id2label, model.config.problem_type) == (
        {0: "False", 1: "True"},
        "single_label_classification",
    )
    assert AutoTokenizer.from_pretrained(slim).model_max_length == POSITIONS


def test_a_run_says_which_training_is_on_and_ends_with_the_comparison_and_what_to_type_next(words, capsys):
    dense, printed, slim = _bert_parameters(labels=2), words.printed, str(words.out / "slim")
    assert re.findall(r"^Training .*", printed, re.MULTILINE) == ["Training 1 of 2: slimmed", "Training 2 of 2: dense"]
    assert re.search(rf"parameters +{dense:,} +{dense:,} +{dense - REMOVED:,}\n", printed)
    assert re.search(r"\n +dense +masked +slimmed\n-+\naccuracy ", printed)
    assert printed.endswith(
        f"The slim model lies in {slim}. Next:\n\n"
        f'  python -c "import hf_slim; from transformers import pipeline; '
        f"print(pipeline('text-classification', '{slim}')('some text'))\"\n"
        f"  hf-slim push {slim} USER/NAME\n"
    )
    load = shlex.split(printed.splitlines()[-2])
    assert load[:2] == ["python", "-c"]
    exec(load[2])  # what the printed command runs
    assert re.fullmatch(r"\[\{'label': '(True|False)', 'score': .*\}\]\n", capsys.readouterr().out)


def test_a_run_keeps_all_it_writes_under_its_folder(words):
    assert list(words.started_in.iterdir()) == []
    assert {path.name for path in words.out.iterdir()} == {"comparison.json", "dense", "slim", "slimmed"}
    for part in ("dense", "slimmed"):
        logs, kept = words.out / part / "runs", sorted(path.name for path in (words.out / part).iterdir())
        assert kept == ["checkpoint-3", "checkpoint-4", "runs"]
        assert any(path.name.startswith("events.out.tfevents") for path in logs.rglob("*"))


def test_units_that_leave_the_model_while_it_trains_and_a_tokenizer_that_widens_a_fresh_config(folder):
    live, printed = run(*_flags(folder, config="narrow.json"), *LIVE)
    dense = _bert_parameters(labels=2)
    assert live["masked"] is None
    assert [live[name]["parameters"] for name in ("dense", "slimmed")] == [dense, dense - REMOVED]
    assert re.search(r"\n +dense +slimmed\n-+\naccuracy ", printed)


def test_a_budget_is_for_the_slimmed_training_alone_and_json_is_all_that_is_printed(folder, capsys):
    flags = ("--slim_target_params", "85%", "--slim_round_to", "8")
    assert main(["run", *_flags(folder, output_dir=folder / "budget"), *flags, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((folder / "budget" / "comparison.json").read_text())
    dense, slimmed = (figures[name]["parameters"] for name in ("dense", "slimmed"))
    assert dense == _bert_parameters(2)
    assert 0.8 * dense < slimmed <= 0.85 * dense


def test_regression_of_pairs(pairs):
    figures = pairs.figures
    assert list(figures["dense"]["metrics"]) == ["pearson", "spearman", "loss"]
    assert figures["dense"]["parameters"] == _bert_parameters(labels=1)
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(pairs.out / "slim")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_language_model_of_bytes(folder):
    figures, printed = run(*_flags(folder, "text.txt", "gpt2.json", output_dir=folder / "bytes"), *SLIM)
    assert "pipeline('text-generation', " in printed
    for name in ("dense", "masked", "slimmed"):
        metrics = figures[name]["metrics"]
        assert list(metrics) == ["loss", "perplexity"]
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-4)

    model = AutoModelForCausalLM.from_pretrained(folder / "bytes" / "slim")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bytes" / "slim")
    assert (model.config.vocab_size, len(tokenizer), model.config.eos_token_id) == (257, 257, 0)
    ids = model.generate(**tokenizer("to be", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(ids[0]).startswith("to be")


def test_a_slim_model_is_fine_tuned_and_slimmed_again(folder, words):
    weights = _flags(
        folder,
        config_name=None,
        tokenizer_name=None,
        model_name_or_path=words.out / "slim",
        output_dir=folder / "again",
    )
    again, _ = run(*weights, *SLIM)
    assert again["dense"]["parameters"] == words.figures["slimmed"]["parameters"]
    # Of each layer 1 of the 2 heads that were left and 16 of 32 channels.
    removed = 2 * (8 * 33 * 3 + 8 * 32 + 16 * 33 + 16 * 32)
    assert again["slimmed"]["parameters"] == words.figures["slimmed"]["parameters"] - removed


def test_without_sparsity_both_trainings_are_the_same(folder):
    with pytest.warns(UserWarning, match="ffn2_sparsity and mha_sparsity are both 0"):
        figures, _ = run(*_flags(folder))
    assert figures["dense"]["metrics"] == figures["masked"]["metrics"] == figures["slimmed"]["metrics"]
    assert figures["slimmed"]["parameters"] == figures["dense"]["parameters"] == _bert_parameters(labels=2)


def test_both_trainings_go_on_from_their_checkpoints(words, tmp_path):
    resumed = words.resume(tmp_path / "resumed")
    for name in ("dense", "masked", "slimmed"):
        assert resumed[name]["metrics"] == words.figures[name]["metrics"]


def test_the_dense_model_is_trained_first_to_teach_the_slimmed_one(words, taught):
    plain, figures = words.figures, taught.figures
    assert re.findall("Training .*", taught.printed) == ["Training 1 of 2: dense", "Training 2 of 2: slimmed"]
    assert figures["dense"] == {**plain["dense"], "latency_ms": figures["dense"]["latency_ms"]}
    assert figures["masked"]["metrics"]["loss"] != plain["masked"]["metrics"]["loss"]
    state = taught.out / "slimmed" / "checkpoint-4" / "trainer_state.json"
    logged = [entry["distill_loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(logged) == 4 and logged[0] > 0
    state = taught.out / "dense" / "checkpoint-4" / "trainer_state.json"
    assert not any("distill_loss" in entry for entry in json.loads(state.read_text())["log_history"])


def test_a_run_goes_on_with_its_dense_teacher(taught, tmp_path):
    resumed = taught.resume(tmp_path / "resumed")
    for name in ("dense", "masked", "slimmed"):
        assert resumed[name]["metrics"] == taught.figures[name]["metrics"]


def test_a_run_learns_from_a_folder(folder, words):
    figures, _ = run(*_flags(folder, slim_teacher=words.out / "slim", output_dir=folder / "from-folder"), *SLIM)
    assert figures["dense"]["metrics"] == words.figures["dense"]["metrics"]
    assert figures["masked"]["metrics"] != words.figures["masked"]["metrics"]


def test_the_best_model_is_one_at_the_target_sparsity(folder):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best |= {"output_dir": folder / "best", "slim_start": 2, "slim_end": 3}
    figures, _ = run(*_flags(folder, save_strategy="steps", save_steps=1, **best), *SLIM)
    assert figures["slimmed"]["parameters"] == _bert_parameters(labels=2) - REMOVED
    assert figures["slimmed"]["metrics"] == pytest.approx(figures["masked"]["metrics"], rel=1e-5)


def test_a_json_file_of_arguments(folder, pairs):
    arguments = {name.removeprefix("--"): v for name, v in zip(pairs.flags[::2], pairs.flags[1::2], strict=True)}
    numbers = ("max_steps", "max_seq_length", "per_device_train_batch_size", "per_device_eval_batch_size")
    numbers += ("ffn2_sparsity", "mha_sparsity", "slim_round_to")
    arguments |= {name: json.loads(arguments[name]) for name in numbers}
    arguments |= {
        "use_cpu": True,
        "slim_live": False,
        "text_column": ["one", "two"],
        "output_dir": str(folder / "json"),
    }
    (folder / "arguments.json").write_text(json.dumps(arguments))
    assert main(["run", str(folder / "arguments.json")]) == 0
    figures = json.loads((folder / "json" / "comparison.json").read_text())
    assert [figures[name]["metrics"] for name in ("dense", "slimmed")] == [
        pairs.figures[name]["metrics"] for name in ("dense", "slimmed")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_file": "t.csv", "slim_scop": "local"}, r"There is no flag --slim_scop: did you mean --slim_scope\?"),
        ({"slim-scop": "local"}, r"There is no flag --slim-scop: did you mean --slim_scope\?"),
        ({"model_name_or_path": "m"}, r".*arguments\.json lacks train_file\."),
        ({"train_file": None}, r".*arguments\.json: train_file is null; leave it out, or give a value\."),
        (
            {"slim-scope": "local", "slim_scope": "local"},
            r".*arguments\.json has both slim-scope and slim_scope: leave one out\.",
        ),
        ({"max-steps": "few"}, r".*arguments\.json: argument --max_steps.*: invalid int value: 'few'"),
        ({"train_file": ["a.csv", "b.csv"]}, r".*arguments\.json: train_file takes one value, got \['a\.csv', 'b.*"),
        ({"slim_scope": "globe"}, r".*arguments\.json: argument --slim_scope.*: invalid choice: 'globe'.*"),
        (
            {"train_file": "t.csv", "ffn2_sparsity": 2},
            r".*arguments\.json: ffn2_sparsity must be in \[0, 1\), got 2: it is the fraction to remove\.",
        ),
        (["run"], r".*arguments\.json must hold an object whose keys are flags, got a list\."),
        ("{", r".*arguments\.json is no JSON: Expecting property name .*"),
    ],
)
def test_a_bad_json_file_of_arguments_is_refused(tmp_path, content, message):
    path = tmp_path / "arguments.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert re.fullmatch(message, refuse("run", path))


def test_a_json_file_that_is_not_there_is_refused():
    assert refuse("run", "nowhere.json") == "There is no file nowhere.json."


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
        ({"config_name": "nobody/nothing"}, "There is no config to be had from nobody/nothing, which is no folder"),
        ({"tokenizer_name": "nobody/nothing"}, "There is no tokenizer to be had from nobody/nothing: "),
        ({"train_file": "nowhere.csv"}, r"There is no file nowhere\.csv"),
        ({"label_column": "stars"}, r"reviews\.csv has no column 'stars'; it has text, label"),
        ({"ffn2_sparsity": "1.0"}, r"ffn2_sparsity must be in \[0, 1\), got 1\.0"),
        ({"slim_start": "0.6"}, r"slim_start must not be after slim_end, got slim_start=0\.6, slim_end=0\.3"),
        ({"slim_end": "5", "ffn2_sparsity": "0.5"}, "slim_end=5 is beyond the last training step, 4"),
        ({"slim_exclude": "nothing.like.that", "ffn2_sparsity": "0.5"}, "nothing.like.that"),
        ({"mha_sparsity": "0.9"}, "mha_sparsity"),
        ({"mha_sparsity": "0.9", "report_to": "tensorboard"}, "mha_sparsity=0.9 is unreachable"),
        ({"mha_sparsity": "0.9", "slim_teacher": "dense"}, "mha_sparsity=0.9 is unreachable"),
        ({"seed": "-1"}, r"^seed must be a whole number from 0 and below 2\*\*32, got -1"),
        ({"per_device_train_batch_size": "0"}, "^--per_device_train_batch_size must be a whole number from 1, got 0"),
        (
            {"resume_from_checkpoint": "out/checkpoint-2"},
            "--resume_from_checkpoint must be true, got 'out/checkpoint-2'",
        ),
        ({"no_such_flag": "1"}, "There is no flag --no_such_flag"),
        ({"ffn-sparsity": "0.5"}, "There is no flag --ffn-sparsity: did you mean --ffn2_sparsity"),
        ({"learning_rat": "0.5", "lerning_rate": 1}, "There is no flag --lerning_rate: did you mean --learning_rate"),
        ({"max_steps": "few"}, "argument --max_steps/--max-steps: invalid int value: 'few'"),
        ({"eval_strategy": "daily"}, "argument --eval_strategy.*: invalid choice: 'daily'"),
        (
            {"load_best_model_at_end": "True", "save_strategy": "epoch"},
            "--load_best_model_at_end requires the save and eval strategy to match",
        ),
        ({"use_cpu": "maybe"}, "argument --use_cpu.*: Truthy value expected: got maybe"),
    ],
)
def test_bad_input_is_refused_before_training_in_one_line(folder, tmp_path, changes, message):
    assert re.search(message, refuse("run", *_flags(folder, **{"output_dir": tmp_path / "out"} | changes)))
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_is_no_flag_is_refused(folder):
    assert refuse("run", "reviews.csv", *_flags(folder)) == "'reviews.csv' is no flag, nor the value of one."


def test_an_output_dir_that_is_a_file_is_refused(folder):
    message = refuse("run", *_flags(folder, output_dir=folder / "reviews.csv"))
    assert re.search(r"--output_dir .*reviews\.csv is a file; name a folder", message)


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(folder, words):
    (folder / "large.txt").write_text("\n".join([*SPECIAL, *WORDS, "more"]))
    flags = _flags(
        folder, config_name=None, model_name_or_path=words.out / "slim", tokenizer_name=folder / "large.txt"
    )
    assert re.search(r"large\.txt has 12 tokens, but the model knows only 11", refuse("run", *flags))


def test_weights_of_other_labels_and_data_without_any_are_refused(folder, words, tmp_path):
    opinions = "\n".join(["text,label", *(f"{opinion} film,{opinion}" for opinion in WORDS[:4])])
    (folder / "opinions.csv").write_text(opinions)
    (folder / "texts.csv").write_text("text\ngood film\nbad film\n")
    weights = {"config_name": None, "tokenizer_name": None, "model_name_or_path": words.out / "slim"}
    weights |= {"output_dir": tmp_path / "out"}
    files = {"train_file": folder / "opinions.csv", "validation_file": folder / "opinions.csv"}
    message = refuse("run", *_flags(folder, **weights | files))
    assert message.endswith(
        "classifier.bias is (2,) in its weights, and the config with the labels of the data says (4,)."
    )
    files = {"train_file": folder / "texts.csv", "validation_file": folder / "texts.csv"}
    message = refuse("run", *_flags(folder, **weights | files))
    assert message == (
        f"{folder / 'texts.csv'} has no column 'label', and {words.out / 'slim'} is a BertForSequenceClassification: "
        "name the --label_column, or give --task causal-lm."
    )
    assert list(tmp_path.iterdir()) == []


def test_unknown_labels_are_refused_before_training(folder):
    (folder / "other.csv").write_text("text,label\ngood film,True\nbad film,Perhaps\n")
    message = refuse("run", *_flags(folder, validation_file=folder / "other.csv"))
    assert re.search(r"other\.csv: the labels .*Perhaps.* do not occur in the training data", message)


def test_a_bug_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("hf_slim.cli.run.load_text_data", lambda data, seed: int("x"))
    with pytest.raises(ValueError, match="invalid literal for int"):
        main(["run", *_flags(folder)])


@pytest.mark.slow
def test_trec_slimmed_is_as_good_as_dense(tmp_path):
    trec, vocabulary = need_data("trec"), need_data("bert-vocab") / "vocab.txt"
    BertConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, max_position_embeddings=64
    ).to_json_file(tmp_path / "config.json")
    figures, _ = run(
        *("--config_name", str(tmp_path / "config.json"), "--tokenizer_name", str(vocabulary)),
        *("--train_file", str(trec / "train.csv"), "--validation_file", str(trec / "test.csv")),
        *("--max_seq_length", "40", "--num_train_epochs", "10", "--per_device_train_batch_size", "32"),
        *("--learning_rate", "5e-4", "--warmup_steps", "0.1", "--weight_decay", "0.01", "--save_strategy", "no"),
        *("--ffn2_sparsity", "0.5", "--mha_sparsity", "0.5", "--output_dir", str(tmp_path / "out")),
    )
    dense, slimmed = (figures[name]["metrics"]["accuracy"] for name in ("dense", "slimmed"))
    assert dense >= 0.80
    assert slimmed >= dense - 0.01
