"""The flags of a subcommand: its help on one screen, the whole of it, and what it refuses."""

import json
from dataclasses import fields

import pytest
from commands import refuse
from transformers import TrainingArguments

from hf_slim.arguments import SlimConfig, SlimTrainingArguments
from hf_slim.cli import main
from hf_slim.cli.data import DataArguments
from hf_slim.cli.flags import describe_flags, parse_flags
from hf_slim.cli.prune import PruneArguments

PRUNE = {"Model": PruneArguments, "Data": DataArguments, "Slimming": SlimConfig}


def _print(capsys, *words: str) -> list[str]:
    assert main(list(words)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", ["demo", "run", "prune", "bench", "compact", "push", "card"])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_on_one_screen(command, word, capsys):
    lines = _print(capsys, command, word)
    assert 8 < len(lines) <= 50 and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"Usage: hf-slim {command} ")


def test_help_explains_our_flags_and_names_what_is_used_most_of_the_others(capsys):
    lines = _print(capsys, "run", "--help")
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Model:", "Data:", "Slimming:", "Output:"]
    explained = [line.split()[0] for line in lines[: lines.index("Output:")] if line.startswith("  --")]
    ours = ["--model_name_or_path", "--train_file", "--ffn2_sparsity", "--slim_live", "--slim_cache_teacher"]
    assert [flag for flag in explained if flag in ours] == ours
    assert "--warmup_steps" not in "".join(lines) and "--learning_rate" in "".join(lines)
    assert "  --ffn2_sparsity 0.0       Fraction of the intermediate channels to remove, in [0, 1)." in lines
    assert "  --slim_live auto          Remove dropped units from the model at once (auto, True, False)." in lines
    assert any(line.startswith("  --train_file (needed)     Training data: ") for line in lines)


def test_help_says_what_is_needed_and_cuts_a_help_only_for_want_of_room():
    few = describe_flags("hf-slim few", "Does little.", {"Model": PruneArguments})
    for field in PruneArguments.__dataclass_fields__.values():
        assert field.metadata["help"].rstrip(".") in " ".join(few.split())
    assert "--output_dir (needed) Folder for the slim model and its tokenizer." in " ".join(few.split())


def test_all_help_explains_every_flag(capsys):
    lines = _print(capsys, "run", "--help-all")
    assert len(lines) > 300
    assert any(line.startswith("  --warmup_steps ") for line in lines)
    assert any(line.startswith("  --ffn2_sparsity ") for line in lines)


def test_values_are_read_with_dashes_or_underscores_as_lists_and_as_booleans():
    flags = ["--model-name-or-path", "m", "--output_dir=out", "--train_file", "t.csv", "--text-column", "a", "b"]
    flags += ["--slim_cache_teacher", "--slim_exclude", "x", "y", "--slim-live", "False", "--num_cal", "3"]
    arguments, data, config = parse_flags(flags, PRUNE)
    assert (arguments.model_name_or_path, arguments.output_dir, arguments.num_calibration_samples) == ("m", "out", 3)
    assert data.text_column == ["a", "b"]
    assert (config.slim_exclude, config.slim_cache_teacher) == (["x", "y"], True)
    with pytest.raises(ValueError, match=r"^There is no flag --text-colums=a: did you mean --text_column\?$"):
        parse_flags([*flags, "--text-colums=a"], PRUNE)


def test_one_flag_of_ours_is_nearer_than_one_of_the_trainers():
    given = ("--model_name_or_path", "m", "--train_file", "t.csv", "--ouput_dir", "out")
    assert refuse("prune", *given) == "There is no flag --ouput_dir: did you mean --output_dir?"
    assert refuse("run", *given) == "There is no flag --ouput_dir: did you mean --output_dir?"
    assert refuse("run", *given[:4], "--xyz", "1") == "There is no flag --xyz; --help-all lists them."


def test_a_misspelt_flag_is_named_before_those_that_are_missing():
    assert refuse("run", "--ffn2-sparsty", "0.5") == "There is no flag --ffn2_sparsty: did you mean --ffn2_sparsity?"
    assert refuse("prune", "--mha_sparsiti=0.5") == "There is no flag --mha_sparsiti: did you mean --mha_sparsity?"
    for theirs in (field.name for field in fields(TrainingArguments)):  # a flag of theirs is no misspelling of ours
        assert refuse("run", f"--{theirs}=1").startswith("--"), theirs


def test_flags_win_over_the_file_before_them_whose_keys_may_have_dashes(tmp_path):
    file = tmp_path / "settings.json"
    content = {"model-name-or-path": "m", "train_file": "t.csv", "ffn2-sparsity": 0.5, "slim_live": False}
    content |= {"text-column": ["a", "b"], "slim_round_to": "8", "slim_exclude": None}
    file.write_text(json.dumps(content))
    arguments, data, config = parse_flags([str(file), "--output-dir", "out", "--ffn2_sparsity", "0.25"], PRUNE)
    assert (arguments.model_name_or_path, arguments.output_dir, arguments.batch_size) == ("m", "out", 8)
    assert (data.train_file, data.text_column) == ("t.csv", ["a", "b"])
    assert (config.ffn2_sparsity, config.slim_live, config.slim_round_to) == (0.25, False, 8)
    with pytest.raises(ValueError, match=r"settings\.json lacks output_dir\.$"):
        parse_flags([str(file)], PRUNE)
    with pytest.raises(ValueError, match=r"^ffn2_sparsity must be in \[0, 1\), got 2\.0"):
        parse_flags([str(file), "--output-dir", "out", "--ffn2_sparsity", "2"], PRUNE)


def test_a_value_in_a_file_is_what_it_is_on_the_command_line(tmp_path):
    kinds = {"Slimming": SlimTrainingArguments}
    (tmp_path / "s.json").write_text(
        json.dumps({"max_steps": 4, "learning_rate": 1, "bf16": False, "lr_scheduler_kwargs": {"a": 1}, "seed": "7"})
    )
    (arguments,) = parse_flags([str(tmp_path / "s.json"), "--use_cpu", "--report_to", "none"], kinds)
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed) == (4, 1, 7)
    assert (arguments.lr_scheduler_kwargs, arguments.bf16, arguments.use_cpu) == ({"a": 1}, False, True)


def test_a_file_comes_before_all_flags():
    message = refuse("prune", "--output_dir", "o", "settings.json", "--train_file", "t.csv")
    assert message == "'settings.json' is no flag, nor the value of one; a file of flags comes before all flags."
