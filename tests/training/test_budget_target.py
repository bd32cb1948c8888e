"""A budget in a plan: near what was asked, for every shape and unit of it, or refused with what is reachable."""

import pytest
import torch
from conftest import build
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_slim import SlimConfig, find_structures
from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.costs import find_costs
from hf_slim.training.plan import make_plan

STACK = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 512}
WORDS = {"vocab_size": 999}
T5 = {"d_model": 128, "d_kv": 16, "d_ff": 512, "num_layers": 3, "num_heads": 8}
SHAPES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**STACK, **WORDS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=8, **WORDS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**STACK, num_key_value_heads=4, **WORDS)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=128, d_kv=16, d_ff=512, num_layers=3, num_heads=8, **WORDS)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**STACK, image_size=64)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**STACK, num_key_value_heads=4, num_local_experts=4, **WORDS)),
}


def plan_for(model, **settings):
    return make_plan(model, SlimConfig(**settings), 1000, found=find_structures(model))


def run(plan, seed=0):
    """All pruning steps with random scores; the masks after each."""
    target = plan.budget
    generator = torch.Generator().manual_seed(seed)
    scores = {s.name: torch.rand(s.units, generator=generator) * (1 + n) for n, s in enumerate(target.structures)}
    masks = [{s.name: torch.ones(s.units, dtype=torch.bool) for s in target.structures}]
    for step in target.schedule.steps:
        masks.append(target.select(scores, masks[-1], step))
    return masks[1:]


@pytest.mark.parametrize("asked", [0.8, 0.6])
@pytest.mark.parametrize("field", ["slim_target_params", "slim_target_flops"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_than_asked_and_hardly_less(shape, field, asked):
    torch.manual_seed(0)
    model = SHAPES[shape]().eval()
    plan = plan_for(model, **{field: asked, "slim_round_to": 8})
    masks = run(plan)
    report = plan.budget.report({name: int(mask.sum()) for name, mask in masks[-1].items()})
    assert report.asked == asked * report.dense
    assert 0.99 * report.asked <= report.got <= report.asked
    dense = sum(p.numel() for p in model.parameters())
    compact_model(model, plan.structures, masks[-1])
    if field == "slim_target_params":
        assert (report.dense, report.got) == (dense, sum(p.numel() for p in model.parameters()))
    for structure in plan.structures:
        kept = int(masks[-1][structure.name].sum())
        assert kept >= max(1, structure.units / 20)
        assert structure.kind == "mha" or kept % 8 == 0


def test_every_pruning_step_removes_its_part_of_the_cost():
    plan = plan_for(SHAPES["bert"](), slim_target_params=0.7, slim_round_to=8, slim_schedule="linear")
    target = plan.budget
    assert (len(plan.targets), target.criterion, plan.last_step) == (1, "fisher", 300)
    costs = [target.costs.total({n: int(m.sum()) for n, m in masks.items()}) for masks in run(plan)]
    dense = target.costs.dense
    for number, cost in enumerate(costs, 1):
        allowed = dense * (1 - 0.3 * number / len(costs))
        assert allowed - 0.01 * dense <= cost <= allowed


def test_a_count_is_what_it_says():
    plan = plan_for(build("bert"), slim_target_params=30_000, slim_round_to=1)
    assert (plan.budget.asked, plan.budget.costs.dense) == (30_000, 37_890)
    assert plan.budget.schedule.target == pytest.approx(1 - 30_000 / 37_890)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"slim_target_params": 0.1, "slim_round_to": 8},
            r"slim_target_params=0.1 is unreachable: with slim_round_to=8, slim_min_heads=1 and a twentieth of every "
            r"layer kept, 24,322 parameters, 0.6419 of the 37,890 that the model has, is the least",
        ),
        ({"slim_target_flops": 1000}, r"slim_target_flops=1000 is unreachable: with slim_round_to=32"),
        (
            {"slim_target_params": 99_999},
            "=99,999 asks for no less than the model has, 37,890 parameters",
        ),
        (
            {"slim_target_params": 0.9, "slim_exclude": [".*"]},
            r"slim_exclude=\['.\*'\] leaves no structure to slim",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_for(build("bert"), **settings)


def test_the_least_that_is_reachable_can_be_asked_for():
    model = build("bert")
    masks = run(plan_for(model, slim_target_params=24_322, slim_round_to=8))[-1]
    assert sorted(int(mask.sum()) for mask in masks.values()) == [1, 1, 8, 8]


def test_what_is_excluded_is_left_alone():
    plan = plan_for(build("bert"), slim_target_params=0.9, slim_round_to=8, slim_exclude=["*layer.0*"])
    assert all(".1." in structure.name for structure in plan.structures)


def test_a_time_is_corrected_by_a_model_of_the_sizes(monkeypatch):
    """Real times are half as far from the dense one as the curves say."""
    measured = []

    def find(model, budget, structures, **rest):
        costs = find_costs(model, budget._replace(unit="parameters"), structures, **rest)

        def measure(kept):
            measured.append(kept)
            return (costs.dense + costs.total(kept)) / 2

        return type(costs)("ms", costs.dense, costs.curves, measure)

    monkeypatch.setattr("hf_slim.training.budget_target.find_costs", find)
    plan = plan_for(build("bert"), slim_target_latency=0.85, slim_round_to=1)
    masks = run(plan)[-1]
    report = plan.budget.report({name: int(mask.sum()) for name, mask in masks.items()})
    assert report.unit == "ms"
    assert report.got == pytest.approx(report.asked, rel=0.02)
    assert measured


def test_weights_must_not_be_spread_where_a_copy_is_run(monkeypatch):
    monkeypatch.setattr("hf_slim.costs.budget_costs.is_spread", lambda model: True)
    assert plan_for(build("bert"), slim_target_params=0.8, slim_round_to=8).targets
    with pytest.raises(ValueError, match="slim_target_flops cannot be used where each process holds only a part"):
        plan_for(build("bert"), slim_target_flops=0.8, slim_round_to=8)
