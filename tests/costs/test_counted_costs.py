"""Parameters and operations by numbers of units, against models that really have so many."""

import copy

import pytest
import torch
from conftest import build, half_masks
from tiny import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LongformerModel, MixtralConfig, MixtralForCausalLM

from hf_slim import SlimConfig, find_structures
from hf_slim.arguments import read_budget
from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.costs import budget_costs, flop_costs
from hf_slim.costs.budget_costs import find_costs
from hf_slim.costs.flop_costs import count_flops, group_structures, make_batches
from hf_slim.costs.skeleton import Skeleton
from hf_slim.training.model_shape import ModelShape

PARAMS, FLOPS = SlimConfig(slim_target_params=0.5), SlimConfig(slim_target_flops=0.5)


def find(model, config, found=None, sizes=None):
    structures = (found or find_structures(model)).structures
    ones = dict.fromkeys((s.name for s in structures), 1)
    return find_costs(
        model,
        read_budget(config),
        structures,
        found=structures,
        sizes=sizes or {},
        floors=ones,
        multiples=ones,
    )


def slim(model):
    """A copy with half of the units, and how many its structures have."""
    structures = find_structures(model).structures
    masks = half_masks(structures)
    small = copy.deepcopy(model)
    compact_model(small, structures, masks)
    return small, {name: int(mask.sum()) for name, mask in masks.items()}


def count(model, batch):
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_exact(family):
    model = build(family)
    small, kept = slim(model)
    costs = find(model, PARAMS)
    assert (costs.unit, costs.dense) == ("parameters", count_parameters(model))
    assert costs.total(kept) == count_parameters(small) < costs.dense


def test_operations_are_exact(family):
    model = build(family)
    small, kept = slim(model)
    costs = find(model, FLOPS)
    (batch,) = make_batches(model, "slim_target_flops")
    assert (costs.unit, costs.dense) == ("FLOPs", count(model, batch))
    assert costs.total(kept) == count(small, batch) < costs.dense


def test_experts_are_counted_for_the_tokens_that_they_get():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    model.set_experts_implementation("eager")
    small, kept = slim(model)
    (batch,) = make_batches(model, "slim_target_flops")
    costs = find(model, FLOPS)
    assert costs.dense == count(model, batch)
    assert costs.total(kept) == count(small, batch)
    assert find(model, PARAMS).total(kept) == count_parameters(small)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("config", [PARAMS, FLOPS], ids=["params", "flops"])
def test_a_model_that_was_made_smaller_costs_what_it_did(family, config):
    model = build(family)
    shape = ModelShape(model)
    before = find(model, config)
    shape.take(model, half_masks(shape.found.structures))
    after = find(model, config, shape.found, shape.sizes_before(model))
    assert (after.dense, after.curves) == (before.dense, before.curves)


def test_equal_structures_are_counted_once():
    model = build("t5", num_layers=3)
    found = find_structures(model)
    skeleton = Skeleton(model, found.structures, {})
    flops = count_flops(skeleton, make_batches(model, "slim_target_flops"), {})
    groups = group_structures(skeleton, found.structures, flops)
    assert sorted(len(group) for group in groups) == [1, 1, 1, 3, 3]  # heads that share a table of biases are one
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(("is_told_apart", "passes"), [(True, 2), (False, 7)])
def test_structures_are_counted_in_one_pass_if_modules_tell_them_apart(is_told_apart, passes, monkeypatch):
    model = build("t5")
    expected = find(model, FLOPS)
    counted = []

    def count_and_note(*arguments):
        counted.append(arguments)
        return count_flops(*arguments)

    for module in (flop_costs, budget_costs):
        monkeypatch.setattr(module, "count_flops", count_and_note)
    if not is_told_apart:
        monkeypatch.setattr(flop_costs, "find_own", lambda flops: {"": flops[""]})
    costs = find(model, FLOPS)
    assert len(counted) == passes  # the dense model, all five groups together, and each by itself
    assert costs.curves == expected.curves


def test_own_operations_are_without_those_inside():
    flops = {"": 20, "a": 12, "a.b": 5, "a.b.c.d": 5, "e.f": 6}
    assert flop_costs.find_own(flops) == {"": 2, "a": 7, "a.b": 0, "a.b.c.d": 5, "e.f": 6}


def test_what_has_no_values_and_asks_for_them():
    with torch.device("meta"):
        model = LongformerModel(tiny_config("longformer"))
    batch = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
    with pytest.raises(ValueError, match="^LongformerModel runs only with weights: "):
        count_flops(Skeleton(model, (), {}), [batch], {})


def test_a_built_model_has_the_sizes_and_runs():
    model = build("bert")
    found = find_structures(model)
    skeleton = Skeleton(model, found.structures, {})
    small, kept = slim(model)
    built = skeleton.build(kept)
    assert [p.shape for p in built.parameters()] == [p.shape for p in small.parameters()]
    (batch,) = make_batches(model, "slim_target_latency")
    assert batch["input_ids"].shape == (1, 128)
    assert torch.isfinite(built(**batch).logits).all()


def test_what_is_no_transformers_model_cannot_be_run():
    with pytest.raises(ValueError, match="slim_target_flops cannot be used with a Linear, which is no transformers"):
        make_batches(torch.nn.Linear(2, 2), "slim_target_flops")
