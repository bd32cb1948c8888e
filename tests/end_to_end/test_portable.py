"""Whoever saves a slim model, whatever loads it: with hf_slim, or without and with `trust_remote_code=True`."""

import copy
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
import transformers
from conftest import half_masks
from peft import LoraConfig, get_peft_model
from tiny import build_tiny
from transformers import AutoConfig, Trainer

from hf_slim import SlimTrainerCallback, SlimTrainingArguments, find_structures, model_slim, save_slimmed
from hf_slim.compaction.config_record import find_auto_classes, has_record
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.made_inputs import make_inputs

MODELS = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "longformer": "AutoModelForSequenceClassification",
    "clip": "AutoModel",
}
ADAPTED = r".*(query|q_proj|c_attn|SelfAttention\.q|q_lin)$"


def masked(name):
    """A tiny model with units zeroed, in each layer another number."""
    model = build_tiny(name, MODELS[name])
    structures = find_structures(model).structures
    order = {s.name: number for number, s in enumerate(structures)}
    zero_units(model, structures, half_masks(structures, keep=lambda s: max(1, s.units // 2 - order[s.name] % 3)))
    return model


def slim(name):
    return model_slim(masked(name), 1)


def make_trainer(name, folder, model=None, **settings):
    """A Trainer that slims a tiny model in two steps."""
    model = build_tiny(name, MODELS[name]) if model is None else model
    batch = {key: value.repeat_interleave(2, 0) for key, value in make_inputs(model).items()}
    batch |= {"return_loss": True} if name == "clip" else {}
    if name in ("gpt2", "llama", "t5"):
        batch["labels"] = batch["input_ids"]
    elif name != "clip":
        batch["labels"] = torch.tensor([0, 1])
    keywords = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2, "save_steps": 2}
    keywords |= {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "slim_start": 1, "slim_end": 1, "slim_round_to": 1}
    args = SlimTrainingArguments(folder, **keywords, **settings)
    data = [{"row": number} for number in range(8)]
    args.remove_unused_columns = False
    collate = {"data_collator": lambda rows: dict(batch)}
    return Trainer(model, args, train_dataset=data, callbacks=[SlimTrainerCallback()], **collate)


def by_save_pretrained(name, folder):
    model = slim(name)
    model.save_pretrained(folder)
    return model


def by_save_slimmed(name, folder):
    save_slimmed(masked(name), folder)
    return model_slim(masked(name))


def by_save_model(name, folder):
    trainer = make_trainer(name, folder.with_name(f"{folder.name}-run"), slim_live=True, save_strategy="no")
    trainer.train()
    trainer.save_model(folder)
    return trainer.model


def by_checkpoint(name, folder):
    trainer = make_trainer(name, folder.with_name(f"{folder.name}-run"), slim_live=True)
    trainer.train()
    os.rename(Path(trainer.args.output_dir, "checkpoint-2"), folder)
    return trainer.model


def by_masked_training(name, folder):
    trainer = make_trainer(name, folder.with_name(f"{folder.name}-run"), slim_live=False, save_strategy="no")
    trainer.train()
    model_slim(trainer.model, 1).save_pretrained(folder)
    return trainer.model


def by_slimmed_trainer(name, folder):
    trainer = make_trainer(name, folder.with_name(f"{folder.name}-run"), slim_live=False, save_strategy="no")
    trainer.train()
    save_slimmed(trainer, folder)
    return model_slim(trainer.model, 1)


def by_merged_adapter(name, folder):
    model = get_peft_model(slim(name), LoraConfig(r=2, target_modules=ADAPTED, init_lora_weights=False))
    model = model.merge_and_unload()
    model.save_pretrained(folder)
    return model


def by_a_loaded_model(name, folder):
    first = folder.with_name(f"{folder.name}-first")
    slim(name).save_pretrained(first)
    model = getattr(transformers, MODELS[name]).from_pretrained(first)
    model.save_pretrained(folder)
    return model


def by_remote_code(name, folder):
    first = folder.with_name(f"{folder.name}-first")
    slim(name).save_pretrained(first)
    model = getattr(transformers, MODELS[name]).from_pretrained(first, trust_remote_code=True)
    model.save_pretrained(folder)
    return model


SAVERS = (
    by_save_pretrained,
    by_save_slimmed,
    by_save_model,
    by_checkpoint,
    by_masked_training,
    by_slimmed_trainer,
    by_merged_adapter,
    by_a_loaded_model,
    by_remote_code,
)

LOAD = """
import json, sys, traceback
if sys.argv[1] == "with":
    import hf_slim
import torch, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

def names(report):
    return set(report["missing_keys"]), {name for name, *_ in report["mismatched_keys"]}

def check(folder, auto_class, options):
    saved = torch.load(folder + "-state.pt")
    load = getattr(transformers, auto_class).from_pretrained
    model, report = load(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    # What is missing of a dense model, and the heads with another number of labels, is missing of a slim one.
    if auto_class not in dense:
        stock = folder.rpartition("/")[0] + "/dense"
        dense[auto_class] = names(load(stock, output_loading_info=True, ignore_mismatched_sizes=True)[1])
    assert names(report) == dense[auto_class], (names(report), dense[auto_class])
    base = model.base_model_prefix + "."
    weights = {name.removeprefix(base): tensor for name, tensor in saved.items()}
    absent = set.union(*names(report))
    for name, tensor in model.state_dict().items():
        if name not in absent and name.removeprefix(base) in weights:
            assert torch.equal(tensor, weights[name.removeprefix(base)]), name

options = {"trust_remote_code": True} if sys.argv[1] == "without" else {}
wrong = {}
for folders in map(json.loads, sys.argv[2:]):
    dense = {}
    for folder, auto_classes in folders.items():
        for auto_class in auto_classes:
            try:
                check(folder, auto_class, options)
            except Exception:
                wrong[folder + " " + auto_class] = traceback.format_exc()[-1500:]
print(json.dumps(wrong))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders to which all savers have saved each model, by its name."""
    roots = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, root in roots.items():
        build_tiny(name, MODELS[name]).save_pretrained(root / "dense")
        for saver in SAVERS:
            model = saver(name, root / saver.__name__)
            torch.save(model.state_dict(), root / f"{saver.__name__}-state.pt")
    return roots


def find_loading(name, root):
    """The Auto classes that load each folder of a model."""
    folders = {}
    for saver in SAVERS:
        config = AutoConfig.from_pretrained(root / saver.__name__)
        record = json.loads((root / saver.__name__ / "config.json").read_text())
        is_stock = saver is by_save_slimmed and name == "llama"  # rounded up, so uniform
        assert ("hf_slim" not in json.dumps(record)) == is_stock, saver.__name__
        auto_classes = find_auto_classes(config).keys()
        assert record.get("auto_map", {}).keys() == (set() if is_stock else auto_classes)
        folders[str(root / saver.__name__)] = list(auto_classes)
        assert MODELS[name] in auto_classes and len(auto_classes) >= 2
    return folders


@pytest.mark.parametrize("library", ["with", "without"])
def test_every_auto_class_loads_what_every_saver_saves(saved, library, warm_python, tmp_path):
    folders = [json.dumps(find_loading(name, root)) for name, root in saved.items()]
    done = warm_python.run(LOAD, library, *folders, library=library == "with", cwd=tmp_path)
    assert done.status == 0, done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, "\n".join(map(" ".join, wrong.items()))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_bit_for_bit(saved, name):
    root = saved[name]
    for saver in SAVERS:
        load = getattr(transformers, MODELS[name]).from_pretrained
        stock, remote = (load(root / saver.__name__, trust_remote_code=trust).eval() for trust in (None, True))
        if has_record(stock.config):
            assert type(remote).__module__.endswith("modeling_hf_slim") and type(stock) is type(remote).__mro__[1]
        inputs = make_inputs(stock)
        with torch.no_grad():
            expected, actual = stock(**inputs), remote(**inputs)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, actual[key]), (saver.__name__, key)


def test_parts_of_a_composite_load_by_themselves(tmp_path):
    model = slim("clip")
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert "hf_slim" in record["text_config"] and "hf_slim" in record["vision_config"] and "hf_slim" not in record
    kinds = ("CLIPTextModel", "CLIPVisionModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
    for kind in kinds:
        part = getattr(transformers, kind).from_pretrained(tmp_path)
        whole = model.state_dict()
        for name, tensor in part.state_dict().items():
            full = name if name in whole else f"{'text' if 'Text' in kind else 'vision'}_model.{name}"
            assert torch.equal(tensor, whole[full]), (kind, name)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_part_is_slimmed_and_the_whole_is_saved(uniform, tmp_path):
    model = build_tiny("t5", "AutoModelForSeq2SeqLM")
    encoder = model.get_encoder()
    structures = find_structures(encoder).structures
    order = {s.name: number for number, s in enumerate(structures)}
    keep = (lambda s: s.units // 2) if uniform else (lambda s: s.units // 2 - order[s.name] % 2)
    zero_units(encoder, structures, half_masks(structures, keep=keep))
    model_slim(encoder, 1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    inputs = make_inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    alone = transformers.T5EncoderModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, alone[f"encoder.{name}"]) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("part", ["text_model", "vision_model"])
def test_a_part_with_a_config_of_its_own_is_slimmed_and_the_whole_is_saved(part, tmp_path):
    model = build_tiny("clip")
    inside = getattr(model, part)
    structures = find_structures(inside).structures
    zero_units(inside, structures, half_masks(structures))
    model_slim(inside, 1)
    model.save_pretrained(tmp_path)
    weights = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_models_that_share_a_layer(tmp_path):
    first, second = build_tiny("bert", MODELS["bert"]), build_tiny("bert", MODELS["bert"])
    second.bert.encoder.layer[0] = first.bert.encoder.layer[0]
    structures = find_structures(first).structures
    zero_units(first, structures, half_masks(structures))
    model_slim(first, 1)
    for number, model in enumerate((first, second)):
        model.save_pretrained(tmp_path / str(number))
        weights = type(model).from_pretrained(tmp_path / str(number)).state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "clip"])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_shared_config_stays_as_it_was(name, uniform, tmp_path):
    config = build_tiny(name, MODELS[name]).config
    auto_class = getattr(transformers, MODELS[name])
    before = config.to_dict()
    a, b = (type(build_tiny(name, MODELS[name]))(config) for _ in range(2))
    shapes = {key: tensor.shape for key, tensor in b.state_dict().items()}
    structures = find_structures(a).structures
    order = {s.name: number for number, s in enumerate(structures)}
    keep = (lambda s: s.units // 2) if uniform else (lambda s: max(1, s.units // 2 - order[s.name] % 2))
    zero_units(a, structures, half_masks(structures, keep=keep))
    model_slim(a, 1)
    assert config.to_dict() == before and b.config is config
    assert {key: tensor.shape for key, tensor in auto_class.from_config(config).state_dict().items()} == shapes
    for folder, model in (("a", a), ("b", b)):
        model.save_pretrained(tmp_path / folder)
        weights = type(model).from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert not (tmp_path / "b" / "modeling_hf_slim.py").exists()
    save_slimmed(b, tmp_path / "c", inplace=True)
    assert config.to_dict().keys() == before.keys()


def layers_dropped():
    """A slim model whose first and third layers are left, and its config says so."""
    model = transformers.AutoModelForSequenceClassification.from_config(
        transformers.BertConfig(
            **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64},
            num_attention_heads=4,
        )
    ).eval()
    structures = find_structures(model).structures
    order = {s.name: number for number, s in enumerate(structures)}
    zero_units(model, structures, half_masks(structures, keep=lambda s: 3 if order[s.name] < 2 else 2))
    model_slim(model, 1)
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = torch.nn.ModuleList([layers[2], layers[0]])
    model.config.num_hidden_layers = 2
    return model


@pytest.mark.parametrize("save", [lambda m, folder: m.save_pretrained(folder), save_slimmed])
def test_layers_dropped_after_slimming(save, tmp_path):
    model = layers_dropped()
    save(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def in_another_process(number, model, queue):
    """What a worker makes of a model that it was sent."""
    with torch.no_grad():
        queue.put(model(**make_inputs(model))[0].numpy())


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("name", ["bert", "longformer", "gpt2", "deepseek_v3"])
def test_slim_models_are_pickled_copied_and_sent(name, remote, tmp_path):
    model = build_tiny(name)
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures, keep=lambda s: max(1, s.units // 2 - 1)))
    model_slim(model, 1)
    if remote:
        model.save_pretrained(tmp_path / "slim")
        model = transformers.AutoModel.from_pretrained(tmp_path / "slim", trust_remote_code=True).eval()
    torch.save(model, tmp_path / "model.pt")
    copies = [pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)]
    copies.append(copy.deepcopy(model))
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert all(torch.equal(each(**inputs)[0], expected) for each in copies)
    copies[0].save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], expected)


def test_workers_that_are_spawned_take_a_slim_model(tmp_path):
    model = build_tiny("longformer")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    model_slim(model, 1)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    worker = context.Process(target=in_another_process, args=(0, model, queue))
    worker.start()
    actual = torch.from_numpy(queue.get())
    worker.join()
    with torch.no_grad():
        torch.testing.assert_close(actual, model(**make_inputs(model))[0], rtol=1e-5, atol=1e-5)


def test_threads_that_slim_leave_others_alone():
    """Models that are built meanwhile, and afterwards, have the weights that their class gives them."""
    config = build_tiny("bert").config
    failures, stop = [], threading.Event()

    def slim_models(seed):
        try:
            for _ in range(4):
                model = build_tiny("llama", "AutoModelForCausalLM")
                structures = find_structures(model).structures
                zero_units(model, structures, half_masks(structures, seed=seed))
                model_slim(model, 1)
        except Exception as error:
            failures.append(error)

    def build_models():
        while not stop.is_set():
            model = transformers.BertModel(config)
            for name, parameter in model.named_parameters():
                if "dense.weight" in name and not 0.005 < float(parameter.std()) < 0.05:
                    failures.append((name, float(parameter.std())))

    builder = threading.Thread(target=build_models)
    slimmers = [threading.Thread(target=slim_models, args=(seed,)) for seed in (1, 2)]
    for thread in (builder, *slimmers):
        thread.start()
    for thread in slimmers:
        thread.join()
    stop.set()
    builder.join()
    build_models_after = transformers.BertModel(config)
    assert 0.005 < float(build_models_after.encoder.layer[0].output.dense.weight.std()) < 0.05
    assert failures == []


def test_per_layer_config_comes_before_the_record(tmp_path):
    """Where the class builds from it, which is found by building it."""
    model = build_tiny("step3p7").language_model
    structures = find_structures(model).of_kind("mha")
    order = {s.name: number for number, s in enumerate(structures)}
    zero_units(model, structures, half_masks(structures, keep=lambda s: s.units - order[s.name]))
    model_slim(model, 1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "hf_slim" not in config and "auto_map" not in config
    assert config["per_layer_config"] == {"1": {"num_attention_heads": 2, "num_key_value_heads": 1}}
    weights = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
