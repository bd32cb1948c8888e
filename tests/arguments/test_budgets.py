"""What may be asked for: a budget as a fraction, a count or milliseconds, and nothing beside it."""

import pytest
from transformers import HfArgumentParser

from hf_slim import SlimConfig, SlimTrainingArguments
from hf_slim.arguments import read_budget, refuse_unused
from hf_slim.arguments.budgets import find_asked

PARAMS, FLOPS, LATENCY = "slim_target_params", "slim_target_flops", "slim_target_latency"


@pytest.mark.parametrize(
    ("field", "given", "kept", "amount"),
    [
        (PARAMS, 0.5, 0.5, 100.0),
        (PARAMS, "50%", 0.5, 100.0),
        (PARAMS, "0.5", 0.5, 100.0),
        (PARAMS, 18e6, 18_000_000, 18_000_000),
        (FLOPS, "120", 120, 120),
        (FLOPS, " 12.5 %", 0.125, 25.0),
        (LATENCY, "50%", 0.5, 100.0),
        (LATENCY, "4ms", "4ms", 4.0),
        (LATENCY, "0.25ms", "0.25ms", 0.25),
        (LATENCY, 1.5, "1.5ms", 1.5),
    ],
)
def test_fractions_counts_and_times(field, given, kept, amount):
    config = SlimConfig(**{field: given})
    assert getattr(config, field) == kept
    assert type(getattr(config, field)) is type(kept)
    budget = read_budget(config)
    assert (budget.field, budget.amount(200)) == (field, amount)
    assert SlimConfig(**{field: kept}) == config  # what a checkpoint keeps is read again


@pytest.mark.parametrize("value", [0, 1, 1.0, -0.5, 2.5, "100%", "150%", "0%", "half", "", "4ms", "nan", True, [0.5]])
def test_what_is_no_budget_is_refused(value):
    with pytest.raises(ValueError, match="slim_target_params must be a fraction of what the dense model has"):
        SlimConfig(slim_target_params=value)
    with pytest.raises(ValueError, match="a whole number of FLOPs above 1, got nan"):
        SlimConfig(slim_target_flops=float("nan"))


@pytest.mark.parametrize("value", [0, 1, "1", "0ms", "-3ms", "infms", "120%", float("inf")])
def test_what_is_no_time_is_refused(value):
    with pytest.raises(ValueError, match=r"slim_target_latency must be .* or milliseconds \('4ms'\), got"):
        SlimConfig(slim_target_latency=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({PARAMS: 0.5, FLOPS: 0.5}, "slim_target_params and slim_target_flops are given"),
        ({LATENCY: 0.5, "mha_sparsity": 0.2}, "mha_sparsity and slim_target_latency are given"),
        ({PARAMS: 0.5, "slim_scope": "local"}, "slim_scope='local' cannot be used with slim_target_params"),
        ({FLOPS: 0.5, "slim_criterion": "magnitude"}, "slim_criterion='magnitude' cannot be used with slim_target_f"),
    ],
)
def test_two_ways_of_asking_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SlimConfig(**settings)


def test_a_budget_counts_as_asked_everywhere():
    assert find_asked(SlimConfig()) == []
    assert find_asked(SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.1)) == ["ffn2_sparsity", "mha_sparsity"]
    assert find_asked(SlimConfig(slim_target_flops="50%")) == [FLOPS]
    with pytest.raises(ValueError, match="has slim_target_params=0.5, but the trainer has no SlimTrainerCallback"):
        refuse_unused(SlimTrainingArguments("out", slim_target_params=0.5))
    with pytest.raises(ValueError, match="slim_end=9 is beyond the last training step, 5"):
        SlimTrainingArguments("out", slim_target_params=0.5, slim_end=9, max_steps=5)


@pytest.mark.parametrize(("flag", "kept"), [("50%", 0.5), ("0.5", 0.5), ("4ms", "4ms")])
def test_flags_of_budgets_parse(flag, kept):
    parser = HfArgumentParser(SlimTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "out", "--slim_target_latency", flag])
    assert args.slim_target_latency == kept
