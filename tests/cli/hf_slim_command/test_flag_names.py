"""Our flags as the command reads them off the sources are those that the dataclasses have."""

from dataclasses import MISSING, fields

import pytest

from hf_slim.arguments import SlimConfig
from hf_slim.bench import BenchArguments
from hf_slim.cli.data import DataArguments
from hf_slim.cli.hf_slim_command.flag_names import check_needed, find_flags, read_default
from hf_slim.cli.model_comparison import CompareArguments
from hf_slim.cli.prune import PruneArguments
from hf_slim.cli.run import ModelArguments

KINDS = {
    "demo": (ModelArguments, DataArguments, SlimConfig),
    "run": (ModelArguments, DataArguments, SlimConfig),
    "prune": (PruneArguments, DataArguments, SlimConfig),
    "bench": (BenchArguments,),
}


@pytest.mark.parametrize("command", KINDS)
def test_the_names_are_those_of_the_fields(command):
    found = [field for kind in KINDS[command] for field in fields(kind)]
    needed = {field.name: field.default is MISSING and field.default_factory is MISSING for field in found}
    assert find_flags(command) == needed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model_name_or_path and --output_dir and --train_file must be given; `hf-slim prune --help` lists"),
        (["--model-name-or-path", "m", "--output_dir=out"], "--train_file must be given"),
        (["--train_file", "t", "--output_dir", "o", "--model_name", "m"], None),  # argparse takes beginnings, too
        (
            ["--model_name_or_path", "m", "--train_file", "t", "--ouput-dir", "o"],
            "There is no flag --ouput_dir: did you",
        ),
        (["settings.json", "--json"], None),
        (["settings.json", "--output_dir", "o"], None),  # which may hold the others
        (["--help-all"], None),
    ],
)
def test_a_flag_that_has_to_be_given_is_named(flags, message):
    if message is None:
        check_needed("prune", flags)
    else:
        with pytest.raises(ValueError, match=message):
            check_needed("prune", flags)


@pytest.mark.parametrize(
    ("file", "owner", "name", "default"),
    [
        ("arguments/slim_fields.py", "SlimArgumentsMixin", "slim_round_to", SlimConfig.slim_round_to),
        ("cli/data.py", "DataArguments", "max_seq_length", DataArguments.max_seq_length),
        ("cli/model_comparison.py", "CompareArguments", "batch_size", CompareArguments.batch_size),
    ],
)
def test_a_default_is_that_of_the_field(file, owner, name, default):
    assert read_default(file, owner, name) == default
