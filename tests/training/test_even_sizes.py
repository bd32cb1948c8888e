"""Sizes that lose the same fraction everywhere."""

import torch
from conftest import build

from hf_slim import find_structures
from hf_slim.costs import count_parameter_costs
from hf_slim.training.even_sizes import fit_evenly, size_evenly
from hf_slim.training.unit_selection import select_units

LIMITS = {"round_to": 8, "min_heads": 1}


def test_they_are_those_of_a_selection_by_layers():
    structures = find_structures(build("bart")).structures
    for sparsity in (0.25, 0.3, 0.5, 0.75):
        for kind in ("ffn", "mha"):
            chosen = [s for s in structures if s.kind == kind]
            masks = {s.name: torch.ones(s.units, dtype=torch.bool) for s in chosen}
            scores = {s.name: torch.rand(s.units) for s in chosen}
            selected = select_units(chosen, scores, masks, sparsity, scope="local", **LIMITS)
            kept = size_evenly(structures, {kind: sparsity}, **LIMITS)
            assert kept == {s.name: s.units for s in structures} | {n: int(m.sum()) for n, m in selected.items()}


def test_floors_are_kept():
    structures = find_structures(build("bert")).structures
    kept = size_evenly(structures, {"ffn": 0.99, "mha": 0.99}, round_to=32, min_heads=3)
    assert sorted(kept.values()) == [3, 3, 32, 32]


def test_the_smallest_fraction_that_meets_a_budget():
    model = build("bert", num_attention_heads=8, intermediate_size=256)
    structures = find_structures(model).structures
    costs = count_parameter_costs(model, structures, {})
    sparsity, kept = fit_evenly(structures, costs, 0.6 * costs.dense, **LIMITS)
    assert costs.total(kept) <= 0.6 * costs.dense
    assert kept == size_evenly(structures, {"ffn": sparsity, "mha": sparsity}, **LIMITS)
    less = size_evenly(structures, {"ffn": sparsity - 0.001, "mha": sparsity - 0.001}, **LIMITS)
    assert costs.total(less) > 0.6 * costs.dense
