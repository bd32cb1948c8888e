"""The flags of a subcommand: its help on one screen, the whole of it, and what it refuses."""

import pytest
from commands import refuse

from hf_slim.arguments import SlimConfig
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
