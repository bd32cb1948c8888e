"""What `hf-slim inspect` says of a model, from its config alone."""

import json
import time
from pathlib import Path

import pytest
from conftest import FAMILIES, build, half_masks
from sparse_models import masked
from tiny import tiny_config
from transformers import GPT2Config, LlamaConfig, MambaConfig, PreTrainedConfig

from hf_slim import find_structures, model_slim
from hf_slim.cli.inspection import InspectArguments, Inspection, inspect_model
from hf_slim.compaction import zero_units
from hf_slim.saving import count_parameters

PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"
SEVEN = LlamaConfig(architectures=["LlamaForCausalLM"])  # its defaults are those of Llama-7B


def inspect(config: PreTrainedConfig, folder: Path, **settings: object) -> Inspection:
    path = folder / "config.json"
    path.write_text(config.to_json_string(use_diff=False))
    return inspect_model(InspectArguments(str(path), **settings))


def config_of(family: str, **changes: object) -> PreTrainedConfig:
    config = build(family, **changes).config
    config.architectures = [FAMILIES[family][0]]
    return config


def ways_of(found: Inspection, scope: str) -> dict[str, bool]:
    (result,) = (result for result in found.results if result.scope == scope)
    names = {way.name: way.name.removeprefix("llama.cpp (GGUF), by ") for way in result.ways}
    return {names[way.name].partition(" (")[0].partition(",")[0]: way.is_open for way in result.ways}


def test_seven_billion_parameters_without_weights(tmp_path):
    begin = time.process_time()
    found = inspect(SEVEN, tmp_path)
    assert time.process_time() - begin < 10  # 2 on a machine that does nothing else
    text = str(found).replace(found.model, "meta-llama/Llama-2-7b-hf")
    assert f"```text\n{text}\n```" in PAGE.read_text(encoding="utf-8")
    assert [(g.name, g.unit, len(g.units), str(g)) for g in found.structures] == [
        ("model.layers.*.self_attn.o_proj", "heads", 32, "32"),
        ("model.layers.*.mlp.down_proj", "channels", 32, "11,008"),
    ]
    width, length, layers, words, channels = 4096, 128, 32, 32000, 11008
    assert {part.name: (part.parameters, part.flops) for part in found.parts} == {
        "embeddings": (words * width, 0),
        "attention": (layers * 4 * width**2, layers * (8 * length * width**2 + 4 * length**2 * width)),
        "ffn": (layers * 3 * width * channels, layers * 6 * length * width * channels),
        "head": (words * width, 2 * length * width * words),
        "other": ((2 * layers + 1) * width, 0),
    }
    assert [(size.asked, size.parameters) for size in found.sizes] == [
        ("as it is", 6_738_415_616),
        ("0.25 of all", 5_119_414_272),
        ("0.5 of all", 3_500_412_928),
        ("0.75 of all", 1_881_411_584),
        ("0.9 of all", 971_247_616),
    ]
    assert [(result.scope, result.form) for result in found.results] == [("local", "stock"), ("global", "record")]
    assert set(ways_of(found, "local").values()) == {True}
    assert ways_of(found, "global") == {
        "from_pretrained": True,
        "ONNX": True,
        "vLLM": False,
        "its own converter": False,
        "hf-slim export gguf": True,
        "generate_batch": False,
        "int8": True,
        "4-bit on a CPU": False,  # one layer has 32 channels more than a multiple of 64
    }


def test_four_bits_take_multiples_of_64(tmp_path):
    config = LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"])
    assert not ways_of(inspect(config, tmp_path), "global")["4-bit on a CPU"]
    assert "mlp.down_proj reads 5536, no multiple of 64; slim_round_to=64\n" in f"{inspect(config, tmp_path)}\n"
    assert ways_of(inspect(config, tmp_path, slim_round_to=64), "global")["4-bit on a CPU"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "t5", "vit"])
def test_what_would_be_left_is_what_is_left(family, tmp_path):
    found = inspect(config_of(family), tmp_path, ffn2_sparsity=0.5, mha_sparsity=0.25, slim_round_to=8)
    model = build(family)
    structures = find_structures(model).structures
    kept = found.sizes[1].units
    assert kept == {s.name: s.units // 2 if s.kind == "ffn" else 3 for s in structures}
    zero_units(model, structures, half_masks(structures, keep=lambda s: kept[s.name]))
    model_slim(model, round_multiplier=1, verify=False)
    assert found.sizes[1].parameters == count_parameters(model)
    model.save_pretrained(tmp_path / "slim")
    slim = inspect_model(InspectArguments(str(tmp_path / "slim")))
    assert (slim.sizes[0].parameters, slim.sizes[0].flops) == (found.sizes[1].parameters, found.sizes[1].flops)
    assert slim.sizes[0].units == kept
    assert slim.form == found.results[0].form
    for each in (found, slim):
        assert sum(part.parameters for part in each.parts) == each.sizes[0].parameters
        assert sum(part.flops for part in each.parts) == each.sizes[0].flops


def test_it_prints_tables(tmp_path):
    lines = str(inspect(config_of("llama"), tmp_path, slim_round_to=8)).splitlines()
    assert lines[0] == f"LlamaForCausalLM from {tmp_path / 'config.json'}"
    for line in (
        "attention       12,288  39.5%  11.53 M  74.5%",
        "all             31,072         15.49 M",
        "FLOPs: a forward pass on input_ids (1, 128)",
        "model.layers.*.self_attn.o_proj  mha  2           4 key-value groups",
        "nothing is skipped",
        "0.5 of all         32                 2      18,784   60.5%  8.151 M   52.6%",
        "saved as                                                 stock    record",
        "vLLM, TGI                                                yes (2)  no (3)",
        "(2) where the architecture is known there",
        "(3) they build layers by plain fields: only a stock result, as slim_scope=local can give",
    ):
        assert line in lines


def test_everything_is_plain_data(tmp_path):
    found = inspect(config_of("bert"), tmp_path, slim_round_to=8)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["structures"][1] == {
        "name": "bert.encoder.layer.*.output.dense",
        "kind": "ffn",
        "unit": "channels",
        "names": ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"],
        "units": [64, 64],
    }
    assert [result["form"] for result in read["results"]] == ["record", "stock", "record"]


def test_channels_alone_where_heads_have_no_field(tmp_path):
    found = inspect(config_of("gpt2"), tmp_path, slim_round_to=8)
    assert [(result.scope, result.form) for result in found.results] == [
        ("local", "record"),
        ("local, channels alone", "stock"),
        ("global", "record"),
    ]
    assert (
        "\nsaved as                                                 record   stock                  record\n"
        in str(found)
    )
    assert not ways_of(found, "local")["generate_batch"]  # as many in all layers, but fewer than the config says
    assert ways_of(found, "local, channels alone")["vLLM"]
    only = inspect(config_of("gpt2"), tmp_path, slim_round_to=8, ffn2_sparsity=0.5)
    assert [(result.scope, result.form) for result in only.results] == [("local", "stock"), ("global", "record")]
    assert ways_of(only, "global")["generate_batch"]


def test_the_layers_of_a_slim_model(tmp_path):
    model = build("llama")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures, keep=lambda s: s.units // (2 if ".0." in s.name else 4)))
    model_slim(model, round_multiplier=1).save_pretrained(tmp_path)
    found = inspect_model(InspectArguments(str(tmp_path), slim_round_to=8))
    assert [(g.unit, g.units) for g in found.structures] == [("key-value groups", (2, 1)), ("channels", (32, 16))]
    assert [(result.scope, result.form) for result in found.results] == [
        ("as it is", "record"),
        ("local", "record"),
        ("global", "record"),
    ]
    assert not ways_of(found, "as it is")["vLLM"]
    text = str(found)
    assert f"LlamaForCausalLM from {tmp_path}, slim by its record" in text
    assert "  2 1 key-value groups\n" in text and "  32 16 channels\n" in text


def test_a_budget_of_parameters_and_one_of_operations(tmp_path):
    config = config_of("bert", num_attention_heads=8, intermediate_size=256)
    found = inspect(config, tmp_path, slim_target_params="70%", slim_round_to=8)
    assert [(result.scope, result.form) for result in found.results] == [("global", "record")]
    dense, slim = found.sizes
    assert slim.asked.startswith("slim_target_params=0.7 (0.")
    assert 0.95 * 0.7 * dense.parameters < slim.parameters <= 0.7 * dense.parameters
    dense, slim = inspect(config, tmp_path, slim_target_flops="50%", slim_round_to=8).sizes
    assert 0.95 * 0.5 * dense.flops < slim.flops <= 0.5 * dense.flops


def test_what_is_left_alone_is_named_with_its_reason(tmp_path):
    found = inspect(tiny_config("bloom"), tmp_path, slim_round_to=8)
    assert [(skip.name, skip.kind, len(skip.names)) for skip in found.skipped] == [("h.*.self_attention", "mha", 2)]
    assert f"skipped\n  mha  h.*.self_attention (2): {found.skipped[0].reason}\n" in str(found)
    mamba = inspect(MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2), tmp_path)
    assert (mamba.structures, mamba.results) == ((), ())
    assert str(mamba).endswith("\n\nnothing in it can be slimmed")


def test_operations_that_cannot_be_counted_are_said_to_be_so(tmp_path):
    found = inspect(tiny_config("longformer"), tmp_path, slim_round_to=8)
    assert (
        "\nFLOPs: not counted, since LongformerModel runs on no input that is made for it without its weights"
        in str(found)
    )
    assert {size.flops for size in found.sizes} == {None}
    assert found.sizes[0].parameters > found.sizes[2].parameters


def test_modules_that_are_excluded_keep_their_units(tmp_path):
    found = inspect(config_of("bert"), tmp_path, slim_round_to=8, slim_exclude=["encoder.layer.0.*"])
    assert sorted(found.sizes[2].units.values()) == [2, 4, 32, 64]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ffn2_sparsity": 0.9, "slim_round_to": 32}, "ffn2_sparsity=0.9 is unreachable: "),
        ({"ffn2_sparsity": 1.5}, "ffn2_sparsity must be "),
        ({"slim_target_params": "1%", "slim_round_to": 8}, "slim_target_params=0.01 is unreachable: "),
        ({"slim_target_flops": 0.5, "mha_sparsity": 0.5}, "each says by itself how much is removed"),
        ({"slim_exclude": ["nothing"]}, "the pattern 'nothing' matches no module"),
    ],
)
def test_settings_that_cannot_be_carried_out(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        inspect(config_of("bert"), tmp_path, **settings)


def test_a_budget_of_operations_that_cannot_be_counted(tmp_path):
    with pytest.raises(
        ValueError, match="^slim_target_flops: .* not counted, since LongformerModel .*: use slim_target"
    ):
        inspect(tiny_config("longformer"), tmp_path, slim_target_flops=0.5, slim_round_to=8)


def test_a_quantized_model_is_refused(tmp_path):
    config = config_of("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="config.json is quantized, .*: name the model that it was made from"):
        inspect(config, tmp_path)


def test_the_folder_is_as_it_was(tmp_path):
    model = masked("bert")
    model_slim(model).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    inspect_model(InspectArguments(str(tmp_path), slim_round_to=8))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_real_gpt2_is_counted_though_it_pads(tmp_path):
    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=99, pad_token_id=3, architectures=["GPT2LMHeadModel"]
    )
    assert inspect(config, tmp_path).sizes[0].flops == 2 * (128 * 24 * 64**2 + 4 * 128**2 * 64) + 2 * 128 * 64 * 99
