"""Train steps of every kind: what each does to its model."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig

from hf_slim.bench.flags import BenchArguments
from hf_slim.bench.shapes import Case, make_cases
from hf_slim.bench.train_steps import PRUNING_STEPS, STEPS, make_steps
from hf_slim.structures import find_structures, get_tensor

SCORING = ("scoring", "scoring snip", "scoring fisher")


@pytest.fixture
def case(tmp_path) -> Case:
    """A small encoder, half of whose units go."""
    BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    ).to_json_file(tmp_path / "bert.json")
    (case,) = make_cases(BenchArguments([str(tmp_path / "bert.json")], sparsities=["0.5,0.5"]))
    return replace(case, batch_size=2, length=8)


def _zeros(model: torch.nn.Module) -> list[int]:
    """Of each structure the units that are there and zero."""
    counts = []
    for structure in find_structures(model).structures:
        (member,) = structure.outputs
        weight = get_tensor(model, member.tensor)
        columns = (weight == 0).all(0)[member.index].all(1)
        counts.append(int(columns.sum()))
    return counts


def test_what_each_kind_does(case):
    steps = make_steps(case, STEPS)
    assert list(steps) == ["plain", "teacher", *SCORING, "pruning", "pruning live", "masked", "live"]
    shared = {steps[kind].model for kind in ("plain", "teacher", *SCORING, "pruning", "masked")}
    assert len({steps[kind].model for kind in steps}) == 3 and len(shared) == 1
    (model,) = shared
    units = [s.units for s in find_structures(model).structures]
    teacher = steps["teacher"].distiller.teacher
    before = [parameter.clone() for parameter in teacher.parameters()]
    assert teacher is not model
    for kind in ("plain", "teacher", *SCORING):
        steps[kind]()
        assert _zeros(model) == [0, 0]
    steps["pruning"]()
    assert _zeros(model) == [0, 0]  # the first step drops nothing
    for _ in range(PRUNING_STEPS):
        steps["pruning"]()
    assert _zeros(model) == [count // 2 for count in units] == [2, 64]
    assert steps["pruning"].slimming.has_reached_target
    steps["live"]()
    assert [s.units for s in find_structures(steps["live"].model).structures] == [2, 64]
    assert [len(step.extra) for step in steps.values()] == [1, 1, 1, 1, 1, PRUNING_STEPS + 1, 0, 0, 1]
    assert all(map(torch.equal, teacher.parameters(), before))
    assert steps["plain"].extra == [0.0] and all(steps[kind].extra[0] > 0 for kind in SCORING)
    criteria = [steps[kind].slimming.plan.targets[0].criterion for kind in SCORING]
    assert criteria == ["taylor", "snip_momentum", "fisher"]
