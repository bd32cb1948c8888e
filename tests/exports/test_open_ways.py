"""What takes a slim model, by its form and its sizes."""

import pytest
from conftest import build

from hf_slim import find_structures
from hf_slim.exports.open_ways import find_ways_out


def ways(model, form):
    found = find_ways_out(model, find_structures(model).structures, form)
    return {shorten(way.name): (way.is_open, way.note) for way in found}


def shorten(name):
    return name.removeprefix("llama.cpp (GGUF), by ").partition(" (")[0].partition(",")[0]


def test_a_stock_language_model_goes_everywhere():
    model = build("llama", hidden_size=64, head_dim=8, num_attention_heads=8)
    assert ways(model, "stock") == {
        "from_pretrained": (True, ""),
        "ONNX": (True, ""),
        "vLLM": (True, "where the architecture is known there"),
        "its own converter": (True, "where the architecture is known there"),
        "hf-slim export gguf": (True, "with a byte-level BPE tokenizer, or none"),
        "generate_batch": (True, ""),
        "int8": (True, ""),
        "4-bit on a CPU": (True, ""),
    }


@pytest.mark.parametrize("form", ["record", "per_layer_config"])
def test_servers_take_only_stock_models(form):
    found = ways(build("llama"), form)
    stock = "only a stock result, as slim_scope=local can give"
    assert found["vLLM"] == (False, f"they build layers by plain fields: {stock}")
    assert found["its own converter"] == (False, f"it writes one size for all layers: {stock}")
    assert found["from_pretrained"][0] and found["ONNX"][0] and found["hf-slim export gguf"][0]
    assert found["generate_batch"][0]  # it has all of its heads
    model = build("llama")
    model.config.num_key_value_heads = 8  # as if half of the groups were gone
    assert not ways(model, form)["generate_batch"][0]


def test_of_what_llama_cpp_does_not_compute_no_file_is_written():
    assert ways(build("gpt2"), "record")["hf-slim export gguf"] == (False, "The model is a GPT2LMHeadModel")


def test_an_encoder_is_not_asked_whether_it_generates():
    assert list(ways(build("bert"), "record")) == ["from_pretrained", "ONNX", "int8", "4-bit on a CPU"]


def test_four_bits_need_multiples_of_64():
    name = "bert.encoder.layer.0.output.dense"
    wide = {"hidden_size": 64, "num_attention_heads": 4}
    assert ways(build("bert", **wide, intermediate_size=64), "stock")["4-bit on a CPU"] == (True, "")
    note = f"{name} reads 96, no multiple of 64; slim_round_to=64"
    assert ways(build("bert", **wide, intermediate_size=96), "stock")["4-bit on a CPU"] == (False, note)
    note = "bert.encoder.layer.0.attention.self.query reads 32, no multiple of 64"
    assert ways(build("bert"), "stock")["4-bit on a CPU"] == (False, note)
