"""GGUF files of slim models hold the sizes and weights of every layer; what llama.cpp cannot compute is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import build
from transformers import AutoConfig
from way_models import build_way_model, make_way_batch, save_way_model
from ways import run_llama_cpp

from hf_slim.exports import gguf_file
from hf_slim.exports.gguf_file import check_computation, convert_tensors, export_gguf, read_sizes

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read_gguf(path):
    """The fields and tensors of a file."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_file_has_the_sizes_of_every_layer(family, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    model = save_way_model(family, "non-uniform", tmp_path / "slim")
    fields, tensors = read_gguf(export_gguf(tmp_path / "slim", tmp_path / "slim.gguf"))
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [2, 4, 6]
    assert fields["deci.attention.head_count_kv"] == [1, 2, 3]
    assert fields["deci.feed_forward_length"] == [470, 507, 433]
    width = model.model.layers[0].self_attn.head_dim
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == width
    assert tensors["blk.1.ffn_down.weight"].shape == (256, 507)
    assert tensors["blk.2.attn_k.weight"].shape == (3 * width, 256)
    query = model.model.layers[0].self_attn.q_proj.weight.detach().half().numpy()
    halves = np.stack([query[: width // 2], query[width // 2 : width]], axis=1).reshape(width, -1)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"][:width], halves)
    np.testing.assert_array_equal(
        tensors["blk.0.attn_v.weight"], model.model.layers[0].self_attn.v_proj.weight.detach().half().numpy()
    )
    assert tensors["blk.0.attn_norm.weight"].dtype == np.float32
    assert ("blk.0.attn_q.bias" in tensors) == (family == "Qwen2")
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert len(fields["tokenizer.ggml.tokens"]) == 257
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim", "slim.gguf"]


def test_a_file_beside_it_of_whatever_name_stays(tmp_path, monkeypatch):
    """Also where writing fails, which leaves nothing else."""

    class Writer:
        def __init__(self, path, architecture):
            self.path = path

        def __getattr__(self, name):
            return lambda *values: self.path.write_text("GGUF new")

    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFWriter=Writer))
    build_way_model("Llama", "uniform").save_pretrained(tmp_path / "slim")
    (tmp_path / "slim.gguf.part").write_text("mine")
    assert export_gguf(tmp_path / "slim", tmp_path / "slim.gguf").read_text() == "GGUF new"
    monkeypatch.setattr(Writer, "write_kv_data_to_file", lambda self: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        export_gguf(tmp_path / "slim", tmp_path / "slim.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim", "slim.gguf", "slim.gguf.part"]
    assert (tmp_path / "slim.gguf.part").read_text() == "mine" and (tmp_path / "slim.gguf").read_text() == "GGUF new"


def test_layers_of_one_size_are_a_llama_without_a_tokenizer_too(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    build_way_model("Qwen2", "uniform").save_pretrained(tmp_path / "slim")
    fields, tensors = read_gguf(export_gguf(tmp_path / "slim", tmp_path / "slim.gguf"))
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count"] == 4
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.feed_forward_length"] == 512
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert "rope_freqs.weight" not in tensors


@pytest.mark.parametrize(
    ("folder", "out", "message"),
    [
        ("slim", "slim/model.safetensors", "model.safetensors is there and is no GGUF file, so that it would be lost"),
        ("slim", "slim", "slim is a folder: name the file to write, such as .*slim/model.gguf"),
        ("slim", "", "^. is a folder: name the file to write, such as model.gguf"),
        ("slim", "gone/slim.gguf", "There is no folder gone for slim.gguf: make it, or name another"),
        ("slim/config.json", "slim.gguf", "config.json is a file: name the folder that the model was saved in"),
    ],
)
def test_a_place_where_no_file_can_be_is_refused_and_nothing_is_lost(folder, out, message, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("slim")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_gguf_file_is_replaced(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    build("llama").save_pretrained(tmp_path / "slim")
    (tmp_path / "slim.gguf").write_bytes(b"GGUF of before")
    export_gguf(tmp_path / "slim", tmp_path / "slim.gguf")
    assert read_gguf(tmp_path / "slim.gguf")[0]["general.architecture"] == "llama"


def test_sizes_are_read_off_the_weights():
    sizes = read_sizes(build_way_model("Llama", "non-uniform"))
    assert sizes == ([2, 4, 6], [1, 2, 3], [470, 507, 433])
    assert not sizes.are_uniform
    assert read_sizes(build_way_model("Llama", "uniform")).are_uniform


def test_scaled_frequencies_are_written_as_factors():
    model = build("llama", rope_parameters=LLAMA3, max_position_embeddings=512)
    factors = dict(convert_tensors(model))["rope_freqs.weight"]
    plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.max() == 8


def test_a_tied_head_is_not_written_twice():
    assert "output.weight" not in dict(convert_tensors(build("llama", tie_word_embeddings=True)))
    assert "output.weight" in dict(convert_tensors(build("llama", tie_word_embeddings=False)))


def test_numbers_that_float16_cannot_hold_are_refused():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has numbers that float16 cannot hold"):
        dict(convert_tensors(model))


def test_numbers_that_float16_loses_are_refused_and_a_few_small_ones_are_not():
    model = build("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[:8] = 1e-9  # as large as nothing beside the others
    assert (dict(convert_tensors(model))["blk.1.ffn_up.weight"][:8] == 0).all()
    with torch.no_grad():
        weight.fill_(1e-9)
    with pytest.raises(ValueError, match=r"up_proj\.weight has numbers so small that float16 loses 100\.0% of the"):
        dict(convert_tensors(model))
    with torch.no_grad():
        weight.zero_()
    assert (dict(convert_tensors(model))["blk.1.ffn_up.weight"] == 0).all()


def test_numbers_that_are_none_are_refused():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.norm\.weight has numbers that are not finite"):
        dict(convert_tensors(model))


def test_a_tensor_that_has_no_place_is_named():
    model = build("llama")
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra\.weight has no place in a GGUF file of a Llama"):
        dict(convert_tensors(model))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bert", {}, "The model is a BertForSequenceClassification: llama.cpp has no graph"),
        ("mistral", {}, "The model is a MistralForCausalLM: llama.cpp has no graph"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', where llama.cpp computes silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, "The model has sliding windows"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(family, changes, message, tmp_path):
    build(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_computation(AutoConfig.from_pretrained(tmp_path))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="`pip install gguf`"):
        export_gguf(tmp_path, tmp_path / "out.gguf")


def compute(path, ids, **settings):
    """The logits that llama.cpp computes of one text."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    return run_llama_cpp(path, ids, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["dense", "uniform", "non-uniform"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_llama_cpp_computes_the_same(family, shape, tmp_path):
    """Measured: 0.011 to 0.018 where the largest logit is 5.2 to 5.8; float16 weights alone make 0.008 to 0.012."""
    model = save_way_model(family, shape, tmp_path / "slim")
    path = export_gguf(tmp_path / "slim", tmp_path / "slim.gguf")
    ids = make_way_batch(model, 1, 20)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    for flash in (False, True):
        found = compute(path, ids[0], flash_attn=flash)
        assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["dense", "uniform", "non-uniform"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_llama_cpp_computes_the_same_to_the_last_digits_of_a_file_in_float32(family, shape, tmp_path, monkeypatch):
    """Measured: 1.0e-5 to 1.4e-5, so that rounding is all there is between a file in float16 and the model."""
    monkeypatch.setattr(gguf_file, "MATRICES", torch.float32)
    model = save_way_model(family, shape, tmp_path / "slim")
    path = export_gguf(tmp_path / "slim", tmp_path / "slim.gguf")
    ids = make_way_batch(model, 1, 20)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    assert (compute(path, ids[0], type_k=0, type_v=0) - expected).abs().max() < 1e-4  # the cache in float32, too


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["uniform", "non-uniform"])
def test_llama_cpp_generates_the_same_token_by_token(shape, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    model = save_way_model("Llama", shape, tmp_path / "slim")
    path = export_gguf(tmp_path / "slim", tmp_path / "slim.gguf")
    loaded = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False)
    text = "the cat. \n it's 123"
    tokens = loaded.tokenize(text.encode(), add_bos=True)
    assert tokens == transformers.AutoTokenizer.from_pretrained(tmp_path / "slim")(text)["input_ids"]
    loaded.eval(tokens)
    for _ in range(24):
        tokens.append(int(np.argmax(loaded.scores[len(tokens) - 1])))
        loaded.eval(tokens[-1:])
    found = torch.from_numpy(np.array(loaded.scores[: len(tokens)]))
    loaded.close()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0]
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.slow
def test_llama_cpp_scales_frequencies_the_same(tmp_path):
    """Measured: 0.02 where the largest logit is 3.6; without the factors 2.2."""
    model = build("llama", rope_parameters=LLAMA3, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "slim")
    ids = torch.arange(1, 60)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    found = compute(export_gguf(tmp_path / "slim", tmp_path / "slim.gguf"), ids)
    assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
