"""Sizes that the fields of a config can say: a uniform model is a stock one, another gets the record."""

import pytest
import torch
from conftest import build

from hf_slim import find_structures
from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.compaction.stock_config_fields import record_shapes


def cut(family, keep):
    model = build(family)
    structures = find_structures(model).structures
    masks = {s.name: torch.arange(s.units) < keep(number, s) for number, s in enumerate(structures)}
    record_shapes(model, compact_model(model, structures, masks))
    return model


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {"intermediate_size": 32, "num_attention_heads": 4}),
        ("llama", {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_a_uniform_model_is_a_stock_one(family, fields):
    model = cut(family, lambda _, s: s.units // 2 if s.kind == "ffn" or family == "llama" else s.units)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert "hf_slim" not in model.config.to_dict()
    stock = type(model)(model.config)
    assert {n: t.shape for n, t in stock.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_another_gets_the_record():
    model = cut("bert", lambda number, s: s.units // 2 if number < 2 else s.units)
    record = model.config.to_dict()["hf_slim"]
    assert model.config.intermediate_size == 64
    assert record["shapes"]["encoder.layer.0.output.dense.weight"] == [32, 32]
    assert not any(name.startswith("encoder.layer.1") for name in record["shapes"])
