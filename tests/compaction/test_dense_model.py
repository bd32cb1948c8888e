"""What a slim model was before any unit left it."""

import copy

import pytest
import torch
from conftest import build
from sparse_models import Holder, masked, masked_and_slim
from transformers import AutoModelForSequenceClassification

from hf_slim import find_structures, model_slim
from hf_slim.compaction.dense_model import find_dense, find_unproven, mark_unproven


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def units(structures):
    return {s.name: s.units for s in structures}


def test_every_family_is_what_it_was(family):
    """Whether its config now says the sizes by fields or by a record."""
    model = masked(family)
    slim = model_slim(copy.deepcopy(model), round_multiplier=1)
    now = shapes(slim)
    dense = find_dense(slim)
    assert shapes(dense.model) == shapes(model) and all(p.is_meta for p in dense.model.parameters())
    assert units(dense.structures) == units(find_structures(model).structures)
    assert dense.sizes.keys() == {name for name, shape in now.items() if shape != shapes(model)[name]}
    assert shapes(slim) == now and not any(p.is_meta for p in slim.parameters())


@pytest.mark.parametrize(("model_type", "auto"), [("albert", "AutoModel"), ("mixtral", "AutoModel")])
def test_shared_layers_and_experts(model_type, auto):
    model, slim = masked_and_slim(model_type, auto)
    dense = find_dense(slim)
    assert shapes(dense.model) == shapes(model)
    assert units(dense.structures) == units(find_structures(model).structures)


def test_a_model_that_has_lost_nothing_is_itself():
    model = build("bert")
    dense = find_dense(model)
    assert dense.model is model and dense.sizes == {}


def test_a_record_says_it_to_whoever_loads_the_model(tmp_path):
    model = masked()
    model_slim(copy.deepcopy(model), 1).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    dense = find_dense(Holder(loaded))
    assert shapes(dense.model.model) == shapes(model)
    assert {s.units for s in dense.structures} == {4, 64}


def test_what_is_not_proven_is_noted_with_the_layers_that_read_it():
    model = model_slim(masked(), 1, verify=False)
    structures = find_structures(model).structures
    assert find_unproven(model, structures) == tuple(s.name for s in structures)
    proven = model_slim(masked(), 1)
    assert find_unproven(copy.deepcopy(proven), structures) == ()
    mark_unproven(proven, structures, {structures[1].name})
    assert find_unproven(copy.deepcopy(proven), structures) == (structures[1].name,)
    assert torch.isfinite(proven(torch.arange(5, 9)[None]).logits).all()
