"""Structures by their places, and what their units are called."""

import pytest
from conftest import FAMILIES, build
from tiny import build_tiny

from hf_slim import Skipped, find_structures
from hf_slim.structures.structure_groups import group_by_place, group_skipped, name_range


def test_one_group_for_all_layers_whose_numbers_alone_differ():
    groups = group_by_place(find_structures(build("t5")).structures)
    assert [(g.name, g.unit, g.units) for g in groups] == [
        ("encoder.block.*.layer.0.SelfAttention.o", "heads", (4,)),
        ("encoder.block.*.layer.1.DenseReluDense.wo", "channels", (64, 64)),
        ("decoder.block.*.layer.0.SelfAttention.o", "heads", (4,)),
        ("decoder.block.*.layer.1.EncDecAttention.o", "heads", (4,)),
        ("decoder.block.*.layer.2.DenseReluDense.wo", "channels", (64, 64)),
    ]
    assert groups[1].names == tuple(f"encoder.block.{n}.layer.1.DenseReluDense.wo" for n in (0, 1))


def test_every_structure_is_in_one_group(family):
    structures = find_structures(build(family)).structures
    groups = group_by_place(structures)
    assert sorted(name for group in groups for name in group.names) == sorted(s.name for s in structures)


@pytest.mark.parametrize(
    ("model_type", "unit"),
    [("gpt_neox", "heads"), ("gpt_bigcode", "heads"), ("deepseek_v3", "heads"), ("phi3", "key-value groups")],
)
def test_what_units_are_called(model_type, unit):
    groups = group_by_place(find_structures(build_tiny(model_type)).structures)
    assert {g.unit for g in groups if g.kind == "mha"} == {unit}


def test_grouped_queries_have_groups():
    units = {name: {g.unit for g in group_by_place(find_structures(build(name)).of_kind("mha"))} for name in FAMILIES}
    grouped = {name for name, found in units.items() if found == {"key-value groups"}}
    assert grouped == {"llama", "mistral", "qwen2"}


def test_numbers_of_units():
    groups = group_by_place(find_structures(build("bert")).structures)
    assert [(str(group), group.range) for group in groups] == [("4", "4"), ("64", "64")]
    assert [name_range(n) for n in ([], [3], [3, 3], [2000, 5, 30])] == ["", "3", "3", "5 to 2,000"]


def test_one_group_for_one_reason():
    skipped = [Skipped(f"h.{n}.attn", "mha", f"h.{n}.attn.c has hooks") for n in (0, 1)]
    skipped += [Skipped("h.2.attn", "mha", "it is tied"), Skipped("h.0.mlp", "ffn", "h.0.attn.c has hooks")]
    assert [(g.name, g.kind, len(g.names), g.reason) for g in group_skipped(skipped)] == [
        ("h.*.attn", "mha", 2, "h.0.attn.c has hooks"),
        ("h.2.attn", "mha", 1, "it is tied"),
        ("h.0.mlp", "ffn", 1, "h.0.attn.c has hooks"),
    ]
