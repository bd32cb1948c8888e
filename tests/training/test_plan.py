"""What a training is to remove, and when: from a SlimConfig or from auto-slim entries."""

import re

import pytest
import torch
from conftest import build

from hf_slim import SlimConfig, find_structures, parse_auto_slim_config
from hf_slim.training.plan import from_state, make_plan, to_state

FIELDS = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.25, "slim_start": 2, "slim_end": 6, "slim_frequency": 2}


def plan(settings, **given):
    model = build("bert")
    return make_plan(model, settings, 10, found=find_structures(model), **given)


def test_settings_become_a_target_for_each_kind():
    made = plan(SlimConfig(**FIELDS, slim_round_to=8, slim_scope="local", slim_live=True))
    assert [(t.kind, t.schedule.target, t.schedule.steps, t.round_to) for t in made.targets] == [
        ("ffn", 0.5, (2, 4, 6), 8),
        ("mha", 0.25, (2, 4, 6), 8),
    ]
    assert (made.live, made.round_to, made.last_step, len(made.structures)) == (True, 8, 6, 4)
    assert made.settings["slim_scope"] == "local"


def test_entries_keep_zeros_and_are_rounded_when_the_model_is_saved():
    entries = parse_auto_slim_config(build("bert"), ffn2_sparsity=0.5, mha_sparsity=0.0, start_step=1, end_step=4)
    made = plan(entries)
    assert [(t.kind, t.criterion, t.round_to) for t in made.targets] == [("ffn", "snip_momentum", 1)]
    assert (made.live, made.round_to, made.last_step, made.settings) == (False, 32, 4, entries)


def test_sparsities_are_those_of_the_masks():
    made = plan(SlimConfig(**FIELDS, slim_round_to=8))
    masks = {s.name: torch.arange(s.units) < s.units * 3 // 4 for s in made.structures}
    assert made.find_sparsities(masks) == {"ffn2_sparsity": 0.25, "mha_sparsity": 0.25}
    assert plan(SlimConfig()).find_sparsities({}) == {"ffn2_sparsity": 0.0, "mha_sparsity": 0.0}


def test_steps_of_a_checkpoint_are_kept_or_refused():
    config = SlimConfig(**FIELDS, slim_round_to=8)
    assert [t.schedule.steps for t in plan(config, steps=[[1, 3], [5]]).targets] == [(1, 3), (5,)]
    with pytest.raises(
        ValueError, match=r"pruning steps, \[\[1, 11\], \[5\]\], do not fit 2 schedules in a training of"
    ):
        plan(config, steps=[[1, 11], [5]])


def test_settings_come_back_from_their_state():
    config = SlimConfig(**FIELDS)
    assert from_state(to_state(config)) == config
    assert from_state(None) is None
    with pytest.raises(ValueError, match="'ffn_sparsity' is not a field of SlimConfig"):
        from_state({"ffn_sparsity": 0.5})


@pytest.mark.parametrize("kind", ["ffn2_sparsity", "mha_sparsity", "slim_target_params"])
def test_what_is_left_alone_for_a_hook_of_somebody_is_told(kind, caplog):
    model = build("gpt2")
    model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda module, args, output: output * 2)
    make_plan(
        model,
        SlimConfig(**{kind: 0.9 if "target" in kind else 0.5}, slim_round_to=8),
        10,
        found=find_structures(model),
    )
    told = r"Not slimmed, .* alone: transformer\.h\.0\.mlp, since a hook on .*c_proj \(.*<lambda>\)"
    assert bool(re.search(told, caplog.text)) == (kind != "mha_sparsity")
