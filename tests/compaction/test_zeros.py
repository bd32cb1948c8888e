"""Which positions of which tensors a mask drops, written and found again."""

import pytest
import torch
from conftest import build, half_masks

from hf_slim import find_structures
from hf_slim.compaction.zeros import find_zero_units, find_zeros, zero_units
from hf_slim.parallel.shards import find_shards
from hf_slim.structures.structure import get_tensor

LAYER = "bert.encoder.layer.0"


@pytest.fixture
def model():
    return build("bert", spread=0.1)


@pytest.fixture
def structures(model):
    return [s for s in find_structures(model).structures if s.name.startswith(LAYER)]


def drop(structures, **units):
    """Masks that drop some units of each kind."""
    return {
        s.name: torch.ones(s.units, dtype=torch.bool).index_fill_(0, torch.tensor(units.get(s.kind, [])).long(), False)
        for s in structures
    }


def test_the_places_of_a_channel_and_of_a_head(model, structures):
    zeros = find_zeros(model, structures, drop(structures, ffn=[5], mha=[1]), find_shards(model))
    head = list(range(8, 16))
    assert {(name, dim): where.tolist() for name, dim, where in zeros} == {
        (f"{LAYER}.intermediate.dense.weight", 0): [5],
        (f"{LAYER}.intermediate.dense.bias", 0): [5],
        (f"{LAYER}.output.dense.weight", 1): [5],
        **{(f"{LAYER}.attention.self.{name}.weight", 0): head for name in ("query", "key", "value")},
        **{(f"{LAYER}.attention.self.{name}.bias", 0): head for name in ("query", "key", "value")},
        (f"{LAYER}.attention.output.dense.weight", 1): head,
    }


def test_where_nothing_is_dropped_there_is_nothing_to_write(model, structures):
    assert find_zeros(model, structures, drop(structures), find_shards(model)) == []


def test_only_what_masks_drop_is_written(model, structures):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = drop(structures, ffn=[0, 7], mha=[2])
    zero_units(model, structures, masks)
    for name, dim, where in find_zeros(model, structures, masks, find_shards(model)):
        before[name].index_fill_(dim, where, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("whole", [False, True])
def test_masks_are_found_again(family, whole):
    model = build(family, spread=0.1)
    structures = find_structures(model).structures
    masks = half_masks(structures)
    zero_units(model, structures, masks)
    found = find_zero_units(model, structures, find_shards(model), whole=whole)
    assert found.keys() == masks.keys() and all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_a_unit_whose_output_is_zero_contributes_nothing(model, structures):
    """But it is not zero as a whole: what makes it is still there."""
    ffn = next(s for s in structures if s.kind == "ffn")
    get_tensor(model, f"{LAYER}.output.dense.weight").data[:, 3] = 0
    assert (~find_zero_units(model, [ffn])[ffn.name]).nonzero().flatten().tolist() == [3]
    assert find_zero_units(model, [ffn], whole=True)[ffn.name].all()


def test_the_weights_are_looked_for_where_the_training_has_them(model, structures):
    class Elsewhere:
        def find_nonzero(self, model, places):
            found = {}
            for name, dim in places:
                size = get_tensor(model, name).shape[dim]
                found[name, dim] = torch.arange(size) != 4
            return found

    ffn = next(s for s in structures if s.kind == "ffn")
    masks = find_zero_units(model, [ffn], Elsewhere(), whole=True)
    assert (~masks[ffn.name]).nonzero().flatten().tolist() == [4]
