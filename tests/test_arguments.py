"""Fields, flags and range checks."""

import json
from dataclasses import dataclass, field, fields

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_slim import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments

NAMES = [
    "ffn2_sparsity",
    "mha_sparsity",
    "slim_start",
    "slim_end",
    "slim_frequency",
    "slim_schedule",
    "slim_criterion",
    "slim_scope",
    "slim_round_to",
    "slim_min_heads",
    "slim_exclude",
    "slim_live",
    "slim_target_params",
    "slim_target_flops",
    "slim_target_latency",
    "slim_teacher",
    "slim_distill_weight",
    "slim_temperature",
    "slim_hidden_weight",
    "slim_distill_from",
    "slim_teacher_dtype",
    "slim_cache_teacher",
]


def test_all_classes_have_the_same_fields():
    assert [f.name for f in fields(SlimArgumentsMixin)] == NAMES
    assert [f.name for f in fields(SlimConfig)] == NAMES
    for cls, base in (
        (SlimTrainingArguments, TrainingArguments),
        (SlimSeq2SeqTrainingArguments, Seq2SeqTrainingArguments),
    ):
        assert {f.name for f in fields(cls)} - {f.name for f in fields(base)} == set(NAMES)
        assert cls("out").output_dir == "out"


def test_every_field_has_help():
    assert all(f.metadata["help"] for f in fields(SlimConfig))


def test_flags_parse():
    parser = HfArgumentParser(SlimTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        "--output_dir out --ffn2_sparsity 0.8 --mha_sparsity 0.6 --slim_start 100 --slim_end 0.7 --slim_frequency 50 "
        "--slim_schedule exp --slim_criterion snip_momentum --slim_scope local --slim_round_to 16 --slim_min_heads 2 "
        "--slim_exclude encoder.layer.0 .*attention --slim_live False "
        "--slim_teacher self --slim_distill_weight 0.7 --slim_temperature 1 --slim_hidden_weight 2 "
        "--slim_distill_from last_hidden --slim_teacher_dtype bfloat16 --slim_cache_teacher True".split()
    )
    assert [getattr(args, name) for name in NAMES] == [
        *(0.8, 0.6, 100, 0.7, 50, "exp", "snip_momentum", "local", 16, 2),
        ["encoder.layer.0", ".*attention"],
        False,
        *(None, None, None, "self", 0.7, 1.0, 2.0, "last_hidden", "bfloat16", True),
    ]
    assert isinstance(args.slim_start, int)


def test_values_survive_json():
    args = SlimTrainingArguments("out", ffn2_sparsity=0.5, slim_exclude=["x"], slim_end=7)
    assert {k: v for k, v in args.to_dict().items() if k in NAMES} == {
        k: v for k, v in json.loads(args.to_json_string()).items() if k in NAMES
    }
    assert args.to_dict()["ffn2_sparsity"] == 0.5
    assert args.to_dict()["slim_end"] == 7
    assert args.to_dict()["slim_exclude"] == ["x"]


def test_mixin_composes_with_another_subclass():
    @dataclass
    class Other(TrainingArguments):
        extra: int = field(default=3)

        def __post_init__(self):
            super().__post_init__()
            self.doubled = 2 * self.extra

    @dataclass
    class Both(SlimArgumentsMixin, Other):
        pass

    args = Both("out", ffn2_sparsity=0.5, extra=4)
    assert (args.doubled, args.ffn2_sparsity, args.output_dir) == (8, 0.5, "out")
    with pytest.raises(ValueError, match="ffn2_sparsity must be in"):
        Both("out", ffn2_sparsity=2)


def test_arguments_without_the_fields_are_refused():
    with pytest.raises(ValueError, match="TrainingArguments has no field 'ffn2_sparsity'"):
        SlimConfig.from_arguments(TrainingArguments("out"))
