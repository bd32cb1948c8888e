"""In what form a slim model would be saved, before there is one."""

import pytest
import torch
import transformers
from conftest import FAMILIES, half_masks

from hf_slim import find_structures
from hf_slim.compaction import model_slim, zero_units
from hf_slim.compaction.saved_form import cut_copy, find_form

FORMS = {
    "bert": "record",
    "gpt2": "record",
    "llama": "stock",
    "t5": "stock",
    "vit": "record",
}


def build_meta(family):
    model_class, config_class, fields = FAMILIES[family]
    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))


@pytest.mark.parametrize("family", FORMS)
def test_it_is_the_form_of_the_slim_model(family):
    model = build_meta(family)
    structures = find_structures(model).structures
    before = model.config.to_dict()
    copied, left = cut_copy(model, structures, {s.name: s.units // 2 for s in structures})
    assert [s.units for s in left] == [s.units // 2 for s in structures]
    assert (find_form(model), find_form(copied)) == ("stock", FORMS[family])
    assert (model.config.to_dict(), find_structures(model).structures[0].units) == (before, structures[0].units)

    real = getattr(transformers, FAMILIES[family][0])(model.config)
    structures = find_structures(real).structures
    zero_units(real, structures, half_masks(structures))
    assert find_form(model_slim(real, round_multiplier=1)) == FORMS[family]
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (copied, real)]
    assert shapes[0] == shapes[1]


def test_channels_have_a_field_where_heads_have_none():
    model = build_meta("bert")
    structures = find_structures(model).structures
    copied, _ = cut_copy(model, structures, {s.name: 32 for s in structures if s.kind == "ffn"})
    assert (find_form(copied), copied.config.intermediate_size) == ("stock", 32)


def test_overrides_by_layer():
    model = build_meta("llama")
    model.config = transformers.LlamaConfig.from_dict(
        {**model.config.to_dict(), "per_layer_config": {0: {"intermediate_size": 32}}}
    )
    assert find_form(model) == "per_layer_config"
