"""A stranger's modules: those that mix units are skipped with a reason or come out exact, honest ones are slimmed."""

import copy
import re

import pytest
import torch
import transformers
from conftest import build
from odd_modules import HONEST, ODD, ONLY_PROOF_SEES, VOCAB, build_model
from transformers.models.bert.modeling_bert import BertSelfAttention
from verdict import half_masks

from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.compaction.zeros import zero_units
from hf_slim.structures.custom_code.activation_functions import InconclusiveError
from hf_slim.structures.discovery import find_structures

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


@pytest.mark.parametrize("name", [*ODD, *HONEST])
def test_reading_alone_takes_no_module_that_mixes_units(name, monkeypatch):
    """As where a module is too large to be tried: only hooks are seen otherwise."""

    def refuse(module, structure):
        raise InconclusiveError("it is too large to be tried")

    monkeypatch.setattr("hf_slim.structures.custom_code.mixing_check.probe_module", refuse)
    found = find_structures(build_model(name, pretrained=False))
    assert bool(found.of_kind(kind_of(name))) == (name in HONEST), str(found)


def test_reasons_name_what_was_found():
    reasons = {
        "MlpSoftmax": r"what it computes with 24 of 48 units is not what it computes with the others zero \(off by",
        "MlpResidual": "its code fails with 16 of 32 units",
        "MlpHooked": r"a hook on layers.0.mlp.fc1 \(MlpHooked.*\) may change what goes through it: remove the hook",
        "MlpWithResidual": "it cannot be run on hidden states alone, and goes over the dimension .*torch.softmax",
        "MlpWeightNorm": "MlpWeightNorm has no known layout; its layers are fc1, fc2",
        "AttentionMaskedScaled": "calculates with a number that depends on how many units there are",
    }
    for name, reason in reasons.items():
        found = find_structures(build_model(name, pretrained=False))
        skipped = next(s for s in found.skipped if s.kind == kind_of(name))
        assert re.search(reason, skipped.reason), skipped.reason


@pytest.mark.parametrize("name", ["MlpSoftmax", "MlpPlain", "AttentionAlibi", "AttentionGrouped"])
def test_meta_models_are_judged_alike_and_nothing_else_is_touched(name):
    model = build_model(name, pretrained=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    names = [s.name for s in find_structures(model).structures]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [s.name for s in find_structures(model.to("meta")).structures] == names


def test_an_activation_of_ones_own_in_a_stock_model():
    model = build("bert")
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.Softmax(-1)
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.Tanh()
    found = find_structures(model)
    assert [s.name.split(".")[3] for s in found.of_kind("ffn")] == ["1"]
    assert [s.name for s in found.skipped] == ["bert.encoder.layer.0"]


def test_a_forward_of_ones_own_in_a_subclass_of_a_stock_class():
    class Scaled(BertSelfAttention):
        def forward(self, hidden_states, *args, **kwargs):
            out, weights = super().forward(hidden_states, *args, **kwargs)
            return out / self.num_attention_heads, weights

    model = build("bert")
    layer = model.bert.encoder.layer[0].attention
    layer.self.__class__ = Scaled
    found = find_structures(model)
    assert [s.name.split(".")[3] for s in found.of_kind("mha")] == ["1"]


@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
def test_a_table_shared_by_all_blocks(kind):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        use_shared_relative_position_bias=True,
    )
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    found = find_structures(model)
    (mha,) = found.of_kind("mha")
    assert [m.dim for m in mha.members if "table" in m.tensor] == [1] and len(mha.outputs) == 2 and not found.skipped
    masks = half_masks(found.structures)
    zero_units(model, found.structures, masks)
    slim = copy.deepcopy(model)
    compact_model(slim, found.structures, masks)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected, actual = (m(pixels).last_hidden_state for m in (model, slim))
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
