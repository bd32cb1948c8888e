"""Attributes that count units, of modules and of configs."""

from conftest import build
from torch import nn
from transformers import GPT2Config

from hf_slim.modeling_hf_slim import ConfigView
from hf_slim.structures.structure import Count
from hf_slim.structures.unit_counts import get_field, set_count


def test_a_field_under_any_of_its_names():
    config = GPT2Config(n_head=3)
    assert get_field(config, "num_attention_heads") == get_field(config, "n_head") == 3
    assert get_field(config, "missing") is None and get_field(None, "n_head") is None
    view = ConfigView(config, n_head=2)
    assert (get_field(view, "n_head"), get_field(view, "n_layer")) == (2, 12)


def test_an_attribute_follows_the_number_of_units():
    module = nn.Module()
    module.width, module.epsilon = 12, 0.5
    set_count(module, Count("", "width", 4), 2)
    set_count(module, Count("", "epsilon", 1.5, inverse=True), 2)
    assert (module.width, module.epsilon) == (8, 0.75)


def test_a_field_of_the_config_changes_for_one_module_only():
    model = build("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    set_count(model, Count("model.layers.0.mlp", "config.intermediate_size", 1), 5)
    assert (first.config.intermediate_size, second.config.intermediate_size) == (5, 64)
    assert model.config.intermediate_size == 64
