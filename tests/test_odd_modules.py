"""A stranger's modules: those that mix units are skipped with a reason or come out exact, honest ones are slimmed."""

import copy

import pytest
import torch
from odd_modules import HONEST, ODD, ONLY_PROOF_SEES, VOCAB, build_model
from verdict import half_masks

from hf_slim.compaction import compact_model
from hf_slim.discovery import find_structures
from hf_slim.masking import zero_units

KINDS = {True: "pretrained", False: "module"}


def kind_of(name):
    return "ffn" if name.startswith(("Mlp", "Gated")) else "mha"


def difference(model):
    """By how much half of the units' removal changes what the model computes, beyond zeroing them."""
    structures = find_structures(model).structures
    masks = half_masks(structures)
    model = model.double()
    zero_units(model, structures, masks)
    slim = copy.deepcopy(model)
    tokens = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
        compact_model(slim, structures, masks)
        return float((slim(tokens).logits - expected).abs().max())


@pytest.mark.parametrize("pretrained", KINDS, ids=KINDS.get)
@pytest.mark.parametrize("name", ODD)
def test_modules_that_mix_units_are_exact_or_skipped(name, pretrained):
    model = build_model(name, pretrained=pretrained)
    found = find_structures(model)
    if name in ONLY_PROOF_SEES:
        assert found.of_kind(kind_of(name))
        assert difference(model) > 1e-6
        return
    assert difference(model) < 1e-10
    skipped = [s for s in found.skipped if s.kind == kind_of(name)]
    assert len(skipped) == 2 and all(s.reason for s in skipped), str(found)


@pytest.mark.parametrize("pretrained", KINDS, ids=KINDS.get)
@pytest.mark.parametrize("name", HONEST)
def test_honest_modules_are_slimmed(name, pretrained):
    model = build_model(name, pretrained=pretrained)
    found = find_structures(model)
    assert [len(found.of_kind(kind)) for kind in ("ffn", "mha")] == [2, 2], str(found)
    assert difference(model) < 1e-10
