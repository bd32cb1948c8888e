"""The model that a command line names, and names of none."""

import json
import os
from pathlib import Path

import pytest
from commands import refuse
from transformers import BertConfig, BertModel, LlamaConfig, Wav2Vec2Config

from hf_slim.cli.model_source import build_without_weights, find_model_class, load_config, load_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./gone", r"^There is no file or folder \./gone\.$"),
        ("gone.json", r"^There is no file or folder gone\.json\.$"),
        (f"{os.sep}gone", "^There is no file or folder /gone"),
        ("a/b/c", "^'a/b/c' is no folder here and no name that the Hub can have, such as google-bert/"),
        ("no such", "^'no such' is no folder here and no name that the Hub can have"),
        (
            "nobody/nothing",
            "^There is no config to be had from nobody/nothing, which is no folder here and is asked for",
        ),
        ("empty", r"^The folder empty holds no config\.json: name the folder that a model was saved in\.$"),
        ("broken.json", "^There is no config to be had from broken.json: .* not a valid JSON file"),
        ("null.json", "^There is no config to be had from null.json: .*not iterable"),
        ("fields.json", "^There is no config to be had from fields.json: .*Should have a `model_type` key"),
        ("unknown.json", "^There is no config to be had from unknown.json: .*model type `zzz`"),
        ("heads.json", r"^There is no config to be had from heads.json: .*hidden size \(65\) is not a multiple"),
        ("none.json", "^There is no config to be had from none.json: .*'num_attention_heads' expected int"),
        ("code", "^There is no config to be had from code: The repository code contains custom code"),
    ],
)
def test_what_is_no_config(name, message, here):
    (here / "empty").mkdir()
    (here / "code").mkdir()
    (here / "broken.json").write_text("{")
    (here / "null.json").write_text("null")
    for path, fields in {
        "fields.json": {"hidden_size": 64},
        "unknown.json": {"model_type": "zzz"},
        "heads.json": {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4},
        "none.json": {"model_type": "bert", "num_attention_heads": None},
        "code/config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    }.items():
        (here / path).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(name)
    assert "\n" not in str(caught.value)


def test_the_class_is_the_architecture_or_that_of_the_auto_class():
    assert find_model_class(LlamaConfig(architectures=["LlamaForCausalLM"])).__name__ == "LlamaForCausalLM"
    assert find_model_class(LlamaConfig(architectures=["MyOwnLlama"])).__name__ == "LlamaModel"
    assert find_model_class(LlamaConfig(architectures=["LlamaConfig"])).__name__ == "LlamaModel"
    assert find_model_class(LlamaConfig(architectures=[3])).__name__ == "LlamaModel"
    assert find_model_class(BertConfig()).__name__ == "BertModel"


def test_a_model_without_weights_is_in_no_memory():
    for config in (BertConfig(num_hidden_layers=1), Wav2Vec2Config(num_hidden_layers=1)):
        model = build_without_weights(config, "x")
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_a_config_of_another_class():
    config = LlamaConfig(architectures=["BertForMaskedLM"], num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"^The config of mine builds no BertForMaskedLM: ") as caught:
        build_without_weights(config, "mine")
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_and_one_with_damaged_ones(tmp_path):
    config = BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=99
    )
    for named, said in ((None, "no class"), (["OurBert"], "the class OurBert")):  # its head would be left out
        config.architectures = named
        config.save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=f"^The config of {tmp_path} names {said}, which transformers does not have"
        ):
            load_model(str(tmp_path))
    config.architectures = ["BertModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be loaded as BertModel: ") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="config.json is a file: name the folder that the model was saved in"):
        load_model(str(tmp_path / "config.json"))


def test_an_export_names_a_folder_without_a_config(tmp_path):
    message = refuse("export", "gguf", tmp_path, tmp_path / "m.gguf")
    assert message == f"The folder {tmp_path} holds no config.json: name the folder that a model was saved in."
