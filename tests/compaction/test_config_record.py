"""The shape record: what is written, what is built from it, what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import STACK, build, half_masks, logits, make_batch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline
from watching import Watching

from hf_slim import find_structures, model_slim, save_slimmed
from hf_slim.compaction.zeros import zero_units

STOCK_IF_UNIFORM = {"llama", "mistral", "t5", "t5-gated"}


def slim_folder(family, folder, *, uniform=False, **changes):
    """A slim model and the folder it was saved to."""
    model = build(family, **changes)
    structures = find_structures(model).structures
    order = {s.name: number for number, s in enumerate(structures)}
    ragged = half_masks(
        structures, keep=lambda s: s.units // 2 - (order[s.name] % 2 if s.kind == "mha" else 4 * (order[s.name] % 3))
    )
    zero_units(model, structures, half_masks(structures) if uniform else ragged)
    model_slim(model, round_multiplier=4)
    save_slimmed(model, folder)
    return model


@pytest.mark.parametrize("uniform", [False, True])
def test_reload_gives_the_same_model(family, uniform, tmp_path):
    model = slim_folder(family, tmp_path, uniform=uniform)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("hf_slim" in config) == (not uniform or family not in STOCK_IF_UNIFORM)
    loaded = type(model).from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(loaded, make_batch(model)), logits(model, make_batch(model)))
    base = AutoModel.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in base.state_dict().items():
        saved = tensors.get(name, tensors.get(f"{model.base_model_prefix}.{name}"))
        assert saved is None or torch.equal(saved, tensor), name


def test_the_record(tmp_path):
    slim_folder("bert", tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["hf_slim"]
    assert {key: record[key] for key in ("version", "model", "base", "infer")} == {
        "version": 1,
        "model": "BertForSequenceClassification",
        "base": "BertModel",
        "infer": [],
    }
    heads = {"num_attention_heads": 2, "all_head_size": 16}
    names = [f"encoder.layer.{number}.attention.self" for number in (0, 1)]
    assert record["attributes"] == {names[0]: heads, names[1]: heads}
    layer = {name: shape for name, shape in record["shapes"].items() if name.startswith("encoder.layer.0.")}
    assert {name.removeprefix("encoder.layer.0."): shape for name, shape in layer.items()} == {
        **{f"attention.self.{name}.weight": [16, 32] for name in ("query", "key", "value")},
        **{f"attention.self.{name}.bias": [16] for name in ("query", "key", "value")},
        "attention.output.dense.weight": [32, 16],
        "intermediate.dense.weight": [28, 32],
        "intermediate.dense.bias": [28],
        "output.dense.weight": [32, 28],
    }
    assert len(record["shapes"]) == 2 * len(layer)


def test_uniform_result_needs_no_key(tmp_path):
    slim_folder("llama", tmp_path, uniform=True)
    config = json.loads((tmp_path / "config.json").read_text())
    fields = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert [config[name] for name in fields] == [4, 2, 8, 32]
    assert "hf_slim" not in config and "auto_map" not in config
    assert not (tmp_path / "modeling_hf_slim.py").exists()


def test_channels_alone_are_stock(tmp_path):
    model = build("bert")
    structures = find_structures(model).of_kind("ffn")
    zero_units(model, structures, half_masks(structures))
    save_slimmed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] == 32 and "hf_slim" not in config


def test_from_config_and_dtype_and_device_map(tmp_path):
    model = slim_folder("bert", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    built = AutoModelForSequenceClassification.from_config(config)
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    mapped = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(logits(mapped, make_batch(model)), logits(model, make_batch(model)))


def test_saving_again_and_slimming_again(tmp_path):
    slim_folder("bert", tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "modeling_hf_slim.py").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(again, make_batch(again)), logits(model, make_batch(model)))
    structures = find_structures(again).structures
    zero_units(again, structures, half_masks(structures))
    save_slimmed(model_slim(again, 2), tmp_path / "third")
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "third")
    assert [s.units for s in find_structures(third).structures] == [1, 14, 1, 16]


def test_pipeline(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "slim", "models", "are", "fast"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    model = build("bert")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    save_slimmed(model, tmp_path / "slim", processing_class=tokenizer)
    classify = pipeline("text-classification", model=str(tmp_path / "slim"), device="cpu")
    (result,) = classify("slim models are fast")
    expected = logits(model, dict(tokenizer("slim models are fast", return_tensors="pt"))).softmax(-1).max()
    assert result["score"] == pytest.approx(float(expected), abs=1e-6)


def test_nested_encoder_alone(tmp_path):
    model = slim_folder("t5", tmp_path)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    prefix = "encoder."
    expected = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in expected.items())


WITHOUT_HF_SLIM = """
import json, sys, traceback
import torch, transformers

def check(folder, auto_class):
    try:
        getattr(transformers, auto_class).from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatched_sizes" in str(error), error
    else:
        raise AssertionError("loaded without the shapes")
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    case = torch.load(folder + "-expected.pt")
    assert model.state_dict().keys() == case["state"].keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, case["state"][name]), name
    with torch.no_grad():  # the kernels, and with them the last bits, are this process's own
        logits = model(**case["batch"]).logits
    torch.testing.assert_close(logits, case["logits"], rtol=1e-6, atol=1e-6)
    transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-again")
    again = getattr(transformers, auto_class).from_pretrained(folder + "-again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(**case["batch"]).logits, logits)
    built = getattr(transformers, auto_class).from_config(model.config, trust_remote_code=True)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}

errors = {}
for name, auto_class in json.loads(sys.argv[1]).items():
    try:
        check(name, auto_class)
        errors[name] = ""
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""
REMOTE = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "bart": "AutoModelForSeq2SeqLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}


@pytest.fixture(scope="module")
def remote_errors(warm_python, tmp_path_factory):
    """For each of these families what went wrong in a process without hf_slim, one process for all of them."""
    folder = tmp_path_factory.mktemp("remote")
    for name in REMOTE:
        model = slim_folder(name, folder / name)
        batch = make_batch(model)
        case = {"batch": batch, "logits": logits(model, batch), "state": model.state_dict()}
        torch.save(case, folder / f"{name}-expected.pt")
    done = warm_python.run(WITHOUT_HF_SLIM, json.dumps(REMOTE), library=False, cwd=folder)
    assert done.status == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_without_hf_slim(name, remote_errors):
    assert remote_errors[name] == ""


def test_remote_code_beside_hf_slim(tmp_path):
    model = slim_folder("bert", tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(loaded, make_batch(model)), logits(model, make_batch(model)))


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["hf_slim"])
    (folder / "config.json").write_text(json.dumps(config))


NAME = "encoder.layer.0.output.dense.weight"
HEADS = "encoder.layer.0.attention.self"


def set_shape(record, shape, name=NAME):
    record["shapes"][name] = shape


def set_heads(record, name, value, path=HEADS):
    record["attributes"].setdefault(path, {})[name] = value


BAD_RECORDS = [
    (lambda r: r.update(version=2), ValueError, "is of version 2, but this hf_slim reads up to 1"),
    (lambda r: r.update(version=0), ValueError, "is damaged: its version is 0"),
    (lambda r: r.update(version=True), ValueError, "is damaged: its version is True"),
    (lambda r: r.pop("version"), ValueError, "is damaged: its version is None"),
    (lambda r: r.pop("shapes"), ValueError, "is damaged: its shapes are None"),
    (lambda r: r.update(shapes=[1, 2]), ValueError, r"is damaged: its shapes are \[1, 2\]"),
    (lambda r: r.pop("attributes"), ValueError, "is damaged: its attributes are None"),
    (lambda r: r.update(infer="all"), ValueError, "is damaged: its infer are 'all'"),
    (lambda r: r.update(infer=[3]), ValueError, r"is damaged: its infer are \[3\]"),
    (lambda r: r.pop("base"), ValueError, "is damaged: its base are None"),
    (lambda r: set_shape(r, [32, 0]), ValueError, r"output.dense.weight the shape \[32, 0\]"),
    (lambda r: set_shape(r, [32, -4]), ValueError, r"output.dense.weight the shape \[32, -4\]"),
    (lambda r: set_shape(r, ["32", 28]), ValueError, r"output.dense.weight the shape \['32', 28\]"),
    (lambda r: set_shape(r, 28), ValueError, "output.dense.weight the shape 28"),
    (lambda r: set_shape(r, [32, 65]), ValueError, r"shape \(32, 65\), but the other fields make it \(32, 64\)"),
    (lambda r: set_shape(r, [28]), ValueError, r"shape \(28,\), but the other fields make it \(32, 64\)"),
    (lambda r: set_heads(r, "num_attention_heads", "2"), ValueError, "is damaged: it gives encoder.layer.0.attention"),
    (lambda r: set_heads(r, "num_attention_heads", float("nan")), ValueError, "is damaged: it gives encoder.layer.0"),
    (lambda r: set_heads(r, "training", 1), ValueError, "BertSelfAttention has no number 'training'"),
    (lambda r: set_heads(r, "forward", 1), ValueError, "BertSelfAttention has no number 'forward'"),
    (lambda r: set_heads(r, "size", 1, "encoder.layer.9"), ValueError, "does not have: encoder.layer.9"),
    (lambda r: set_shape(r, [8], "encoder.layer.7.x"), ValueError, "does not have: encoder.layer.7"),
    (lambda r: set_shape(r, [8], "encoder.layer.0.output.dense.x"), ValueError, "not have: .*output.dense.x"),
    (lambda r: set_shape(r, [8], "elsewhere.fc2.weight"), ValueError, "does not have: elsewhere.fc2"),
    (lambda r: r["infer"].append("encoder.layer.7"), ValueError, "does not have: encoder.layer.7"),
    (lambda r: set_shape(r, [32, 24]), RuntimeError, "mismatched_sizes"),
    (lambda r: r["shapes"].pop(NAME), RuntimeError, "mismatched_sizes"),
]


@pytest.fixture(scope="module")
def slim_bert(tmp_path_factory):
    """The folder of a slim model."""
    folder = tmp_path_factory.mktemp("bert")
    slim_folder("bert", folder)
    return folder


@pytest.mark.parametrize(("change", "error", "message"), BAD_RECORDS)
def test_a_bad_record_is_refused(change, error, message, slim_bert, tmp_path):
    shutil.copytree(slim_bert, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, change)
    for auto_class in (AutoModelForSequenceClassification, AutoModel, transformers.AutoModelForTokenClassification):
        for trust in (None, True):
            with pytest.raises(error, match=message):
                auto_class.from_pretrained(tmp_path, trust_remote_code=trust)


@pytest.mark.parametrize("value", [False, True, None, 3, "yes", [], {}, {"channels": 3}])
@pytest.mark.parametrize("key", ["hf_slim", "slim"])
def test_a_key_of_somebody_elses_is_left_alone(key, value, tmp_path):
    config = build("bert").config
    setattr(config, key, value)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert getattr(loaded.config, key) == value
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    if key == "hf_slim" and value is not None:
        structures = find_structures(model).structures
        zero_units(model, structures, half_masks(structures))
        with pytest.raises(ValueError, match="has a key 'hf_slim' that is no shape record"):
            model_slim(model, 1)


def test_channels_as_many_as_the_hidden_size(tmp_path):
    """One network ends with as many channels as its hidden states have, the other does not."""
    fields = {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}
    config = transformers.DebertaV2Config(vocab_size=99, **STACK, **fields)
    model = transformers.DebertaV2ForSequenceClassification(config).eval()
    structures = find_structures(model).of_kind("ffn")
    masks = {s.name: torch.arange(s.units) < size for s, size in zip(structures, (32, 48), strict=True)}
    zero_units(model, structures, masks)
    save_slimmed(model_slim(model, 16), tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [s.units for s in find_structures(loaded).of_kind("ffn")] == [32, 48]


def test_two_models_with_one_config(tmp_path):
    class Pair(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert, self.other = transformers.BertModel(config), transformers.BertModel(config)
            self.post_init()

    model = Pair(build("bert").config)
    structures = find_structures(model).structures
    order = {s.name: number for number, s in enumerate(structures)}
    zero_units(model, structures, half_masks(structures, keep=lambda s: 2 if order[s.name] < 4 else 3))
    model_slim(model, 1)
    model.save_pretrained(tmp_path)
    loaded = Pair.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_model_built_without_its_pooler(tmp_path):
    model = transformers.BertModel(build("bert").config, add_pooling_layer=False)
    structures = find_structures(model).of_kind("ffn")
    zero_units(model, structures, half_masks(structures))
    save_slimmed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] == 32 and "hf_slim" not in config


def test_heads_that_do_not_divide_the_hidden_size(tmp_path):
    """The config class refuses such a number of heads, so it stays in the record."""
    model = build("llama")
    structures = find_structures(model).of_kind("mha")
    zero_units(model, structures, {s.name: torch.arange(s.units) < 3 for s in structures})
    save_slimmed(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_attention_heads"] == 8
    numbers = config["hf_slim"]["attributes"].values()
    assert [values["hf_slim_key_value_heads"] for values in numbers] == [3, 3]
    loaded = type(model).from_pretrained(tmp_path)
    assert [s.units for s in find_structures(loaded).of_kind("mha")] == [3, 3]


def test_a_network_of_one_channel(tmp_path):
    """As many channels as some attribute of the module says that has nothing to do with them."""
    model = build("bert")
    structures = find_structures(model).of_kind("ffn")
    zero_units(
        model, structures, {s.name: torch.arange(s.units) < size for s, size in zip(structures, (1, 5), strict=True)}
    )
    save_slimmed(model_slim(model, 1), tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [s.units for s in find_structures(loaded).of_kind("ffn")] == [1, 5]


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_weight_file_is_named(share, tmp_path):
    slim_folder("bert", tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: int(share * len(data))])
    message = f"^{tmp_path}/model.safetensors is damaged: .* Save or download the model again"
    for load in (AutoModelForSequenceClassification.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(SafetensorError, match=message):
            load(tmp_path)


def test_the_damaged_shard_is_named(tmp_path):
    slim_folder("bert", tmp_path / "whole").save_pretrained(tmp_path / "slim", max_shard_size="60KB")
    shards = sorted((tmp_path / "slim").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].write_bytes(shards[1].read_bytes()[:-9])
    with pytest.raises(SafetensorError, match=f"^{shards[1]} is damaged: "):
        AutoModel.from_pretrained(tmp_path / "slim")


def test_no_dense_weight_is_made_to_load_a_slim_model(family, tmp_path):
    slim_folder(family, tmp_path)
    with Watching() as watching:
        dense = build(family)
    slim = type(dense).from_pretrained(tmp_path)
    shapes = [{tensor.shape for tensor in model.state_dict().values()} for model in (dense, slim)]
    assert watching.made & (shapes[0] - shapes[1])
    for keywords in ({}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}):
        with Watching() as watching:
            type(slim).from_pretrained(tmp_path, **keywords)
        assert not watching.made & (shapes[0] - shapes[1])


class Extra(transformers.BertForSequenceClassification):
    """Adds a layer after the class that it inherits from is done."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = transformers.models.bert.modeling_bert.BertLayer(config)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        hidden = self.extra(self.bert(input_ids).last_hidden_state)
        return {"logits": self.classifier((hidden[0] if isinstance(hidden, tuple) else hidden)[:, 0])}


@pytest.mark.parametrize("uniform", [False, True])
def test_layers_added_by_a_subclass(uniform, tmp_path):
    model = Extra(build("bert").config).eval()
    structures = find_structures(model).structures
    assert any(s.name.startswith("extra.") for s in structures)
    order = {s.name: number for number, s in enumerate(structures)}
    keep = (lambda s: s.units // 2) if uniform else (lambda s: s.units // 2 - order[s.name] % 2)
    zero_units(model, structures, half_masks(structures, keep=keep))
    model_slim(model, 1)
    model.save_pretrained(tmp_path)
    state = Extra.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    edit(tmp_path, lambda r: set_shape(r, [8], "../nowhere.weight"))
    with pytest.raises(ValueError, match="names what Extra does not have: ../nowhere"):
        Extra.from_pretrained(tmp_path)
