"""Adapters on slim models, and slimming while only adapters train."""

import copy
import os

import pytest
import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from conftest import build, logits, make_batch
from sparse_models import Holder, masked
from trainers import (
    HALF,
    kept,
    make_encoder,
    make_encoder_trainer,
    make_sft_trainer,
    make_trainer,
    slim_callback,
    watch,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_slim import SlimConfig, find_structures, model_slim, save_slimmed
from hf_slim.compaction.zeros import find_zero_units, zero_units
from hf_slim.training.plan import make_plan

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'hf-slim[integrations]'")

BERT_LAYERS = ["query", "value", "intermediate.dense", "output.dense"]
LLAMA_LAYERS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
TARGETS = {
    "bert": BERT_LAYERS,
    "llama": LLAMA_LAYERS,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
AUTO = {
    "bert": AutoModelForSequenceClassification,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


def adapt(model, family="bert", **changes):
    """The model with low-rank adapters, whose second factors are not zero."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[family], "task_type": TASKS[family], **changes}
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def fill(model):
    """Give the second factors of adapters values, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def plain(trainer):
    return extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False).eval()


def half_of(model):
    """Its structures, and masks that keep every other unit."""
    structures = find_structures(model).structures
    return structures, {s.name: torch.arange(s.units) % 2 == 0 for s in structures}


def step(model, batch):
    """One optimizer step on what trains; returns the gradients."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items()}
    optimizer.step()
    optimizer.zero_grad()
    return gradients


# --------------------------------------------------------------------------------------- adapters on a slim model


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_train_on_a_slim_model(family, tmp_path):
    save_slimmed(masked(family), tmp_path / "slim")
    load = AUTO[family].from_pretrained
    model = adapt(load(tmp_path / "slim"), family, lora_dropout=0.0)
    batch = make_batch(model.get_base_model())
    before = logits(model.eval(), batch)
    model.train()
    first, second = step(model, batch), step(model, batch)
    ups = [name for name in first if "lora_B" in name]
    downs = [name for name in first if "lora_A" in name]
    assert len(ups) == len(downs) > 0
    assert all(first[name].abs().max() > 0 for name in ups)
    assert all(second[name].abs().max() > 0 for name in downs)
    after = logits(model.eval(), batch)
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "slim"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, batch), after)
    torch.testing.assert_close(logits(again.merge_and_unload(), batch), after, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------- slimming while only adapters train


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_are_members(family):
    model = build(family)
    plain_structures = {s.name: s for s in find_structures(model).structures}
    found = find_structures(fill(adapt(model, family)))
    assert {s.name.removeprefix("base_model.model."): s.units for s in found.structures} == {
        name: s.units for name, s in plain_structures.items()
    }
    adapters = {m.tensor: m for s in found.structures for m in s.members if "lora_" in m.tensor}
    assert {(m.dim, m.role) for name, m in adapters.items() if "lora_A" in name} == {(1, "adapter")}
    assert {(m.dim, m.role) for name, m in adapters.items() if "lora_B" in name} == {(0, "extra")}


@pytest.mark.parametrize("family", TARGETS)
def test_merging_gives_what_the_masked_model_with_adapters_computes(family, tmp_path):
    model = fill(adapt(build(family), family)).eval()
    structures, masks = half_of(model)
    zero_units(model, structures, masks)
    units = find_zero_units(model, structures)
    assert all(torch.equal(units[name], mask) for name, mask in masks.items())
    batch = make_batch(model.get_base_model())
    before, state = logits(model, batch), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = save_slimmed(model, tmp_path / "slim")
    assert [s.after * 2 for s in report.structures] == [s.before for s in report.structures]
    assert not any("lora" in key or "base_layer" in key for key in _keys(tmp_path / "slim"))
    assert not os.path.exists(tmp_path / "slim" / "adapter_config.json")
    loaded = AUTO[family].from_pretrained(tmp_path / "slim").eval()
    torch.testing.assert_close(logits(loaded, batch), before, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_unit_that_only_its_adapter_uses_is_used():
    model = fill(adapt(build("bert")))
    structures = find_structures(model).structures
    ffn = next(s for s in structures if s.kind == "ffn")
    output = ffn.outputs[0]
    with torch.no_grad():
        model.get_parameter(output.tensor)[:, 7] = 0
    assert find_zero_units(model, structures)[ffn.name].all()
    with torch.no_grad():
        model.get_parameter(output.tensor.replace("base_layer", "lora_A.default"))[:, 7] = 0
    assert (~find_zero_units(model, structures)[ffn.name]).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_training_to_the_target(settings, tmp_path):
    model = adapt(build("bert", spread=0.1))
    if settings:
        model.enable_input_require_grads()
    trainer = make_trainer(model, tmp_path / "out", slim_criterion="magnitude", weight_decay=0.1, **settings)
    watcher = watch(trainer)
    trainer.train()
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert (watcher.steps, watcher.moved, watcher.returned) == (12, 0, 0)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    report = save_slimmed(trainer, tmp_path / "slim")
    assert report.parameters_after < report.parameters_before
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").eval()
    batch = make_batch(loaded)
    torch.testing.assert_close(logits(loaded, batch), logits(plain(trainer), batch), atol=1e-5, rtol=1e-4)


def test_sft_trainer_with_adapters(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=LLAMA_LAYERS, task_type="CAUSAL_LM")
    trainer = make_sft_trainer(tmp_path / "out", peft_config=config, slim_criterion="magnitude")
    watcher = watch(trainer)
    trainer.train()
    assert isinstance(trainer.model, peft.PeftModel)
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert (watcher.steps, watcher.moved, watcher.returned) == (12, 0, 0)
    save_slimmed(trainer, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    batch = make_batch(loaded)
    torch.testing.assert_close(
        logits(loaded.float(), batch), logits(plain(trainer).float(), batch), atol=1e-4, rtol=1e-3
    )


def test_sentence_transformer_with_adapters(tmp_path):
    """Adapters that were put into the transformers model itself."""
    st = pytest.importorskip("sentence_transformers")
    model = make_encoder(tmp_path / "base")
    inner, config = model[0].model, peft.LoraConfig(r=2, target_modules=BERT_LAYERS, task_type="FEATURE_EXTRACTION")
    peft.inject_adapter_in_model(config, inner)  # as add_adapter does
    inner.peft_config, inner._hf_peft_config_loaded = {"default": config}, True
    trainer = make_encoder_trainer(model, tmp_path / "out", slim_criterion="magnitude")
    watcher = watch(trainer)
    trainer.train()
    assert (watcher.steps, watcher.moved, watcher.returned) == (12, 0, 0)
    save_slimmed(trainer, tmp_path / "slim")
    slim = st.SentenceTransformer(str(tmp_path / "slim"), device="cpu")
    sentences = ["the cat sees the dog", "river"]
    expected = trainer.model.encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(slim.encode(sentences, convert_to_tensor=True), expected, atol=1e-5, rtol=0)
    assert any("lora_A" in name for name, _ in trainer.model.named_parameters())
    assert inner.peft_config and inner._hf_peft_config_loaded


def test_an_adapter_that_lies_beside_the_weights(tmp_path):
    """`from_pretrained` loads both, and the names of the adapter's file are not those of the model's."""
    sparse = masked()
    adapted = fill(adapt(copy.deepcopy(sparse))).eval()
    sparse.save_pretrained(tmp_path / "both")
    adapted.save_pretrained(tmp_path / "both")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "both").eval()
    batch = make_batch(model)
    torch.testing.assert_close(logits(model, batch), logits(adapted, batch), atol=1e-5, rtol=1e-5)
    for verify in (True, False):
        save_slimmed(model, tmp_path / "slim", verify=verify)
        slim = AutoModelForSequenceClassification.from_pretrained(tmp_path / "slim").eval()
        torch.testing.assert_close(logits(slim, batch), logits(adapted, batch), atol=1e-5, rtol=1e-5)


def test_a_module_around_a_model_with_adapters(tmp_path):
    holder = Holder(fill(adapt(masked())).eval())
    zero_units(holder, *half_of(holder))
    batch = make_batch(holder.model.get_base_model())
    expected = logits(holder.model, batch)
    report = save_slimmed(holder, tmp_path / "slim")
    assert [s.after * 2 for s in report.structures] == [s.before for s in report.structures]
    loaded = Holder.from_pretrained(tmp_path / "slim").model.eval()
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(holder.model, peft.PeftModel)


def test_resuming(tmp_path):
    """A checkpoint holds the adapters only; the units dropped so far are zeroed in the base model again."""
    settings = {
        "slim_criterion": "magnitude",
        "save_strategy": "steps",
        "save_steps": 6,
        "lr_scheduler_type": "constant",
    }
    whole = make_trainer(adapt(build("bert", spread=0.1)), tmp_path / "out", **settings)
    whole.train()
    resumed = make_trainer(adapt(build("bert", spread=0.1)), tmp_path / "out", **settings)
    watcher = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert (watcher.steps, watcher.moved, watcher.returned) == (6, 0, 0)
    assert kept(resumed) == kept(whole)
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("criterion", ["taylor", "snip_momentum"])
def test_gradients_of_frozen_weights_are_not_there(criterion, tmp_path):
    trainer = make_trainer(adapt(build("bert")), tmp_path, slim_criterion=criterion)
    with pytest.raises(
        ValueError, match="slim_criterion='magnitude'. Or slim first, and add the adapters to the slim"
    ):
        trainer.train()


def variant(family="bert", **changes):
    return lambda: adapt(build(family), family, **changes)


def other(config, **changes):
    return lambda: peft.get_peft_model(build("bert"), getattr(peft, config)(task_type="SEQ_CLS", **changes))


class Packed(torch.nn.Linear):
    """A layer whose weight is not floating-point numbers, as after quantization."""


def quantized():
    model = build("bert")
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "encoder" in path:
            packed = Packed(module.in_features, module.out_features)
            packed.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
            model.set_submodule(path, packed)
    return adapt(model, init_lora_weights=False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (variant(use_dora=True), "has an adapter of another kind than plain LoRA"),
        (variant(lora_bias=True), r"lora_B.default.bias changes what .*base_layer computes, and no layout says how"),
        (variant(alora_invocation_tokens=[5, 6], family="llama"), "another kind than plain LoRA"),
        (other("VeraConfig", target_modules=BERT_LAYERS), "adapters of the type VERA"),
        (other("IA3Config", target_modules=BERT_LAYERS, feedforward_modules=["output.dense"]), "of the type IA3"),
        (other("PromptTuningConfig", num_virtual_tokens=3), "adapters of the type PROMPT_TUNING"),
        (other("PrefixTuningConfig", num_virtual_tokens=3), "adapters of the type PREFIX_TUNING"),
        (quantized, r"base_layer is torch.int8 of shape .*, as after quantization"),
    ],
    ids=["dora", "bias", "alora", "vera", "ia3", "prompt", "prefix", "quantized"],
)
def test_what_no_layout_explains_is_skipped(make, reason):
    model = make()
    found = find_structures(model)
    assert not found.structures and found.skipped
    with pytest.raises(ValueError, match=reason):
        make_plan(model, SlimConfig(slim_criterion="magnitude", **HALF), 12, found=find_structures(model))


def test_adapters_of_stacked_experts_are_skipped():
    config = transformers.MixtralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config)
    assert find_structures(model).of_kind("ffn")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    )
    found = find_structures(adapted)
    assert not found.of_kind("ffn")
    assert any("changes what" in skip.reason for skip in found.skipped), str(found)


def test_copies_of_a_feed_forward_network_are_skipped():
    found = find_structures(adapt(build("llama"), "llama", target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert not found.of_kind("ffn") and len(found.of_kind("mha")) == 2
    assert any("modules_to_save" in skip.reason for skip in found.skipped)


def test_a_convolution_is_no_linear_layer_for_an_adapter():
    """GPT-2's Conv1D is one, whose weight lies the other way round than the adapter's."""
    model = adapt(build("gpt2"), "gpt2")
    structure = next(s for s in find_structures(model).structures if s.kind == "ffn")
    assert isinstance(model.get_submodule(structure.name).base_layer, Conv1D)
    assert [m.dim for m in structure.members if m.role in ("output", "adapter")] == [0, 1]


def test_a_model_with_adapters_is_not_made_smaller_in_place(tmp_path):
    model = adapt(masked())
    with pytest.raises(ValueError, match=r"PeftModelForSequenceClassification has adapters.*merge_and_unload"):
        model_slim(model)
    with pytest.raises(ValueError, match="inplace=True cannot slim"):
        save_slimmed(model, tmp_path / "slim", inplace=True)


def test_adapters_that_cannot_be_merged(tmp_path):
    model = other("PromptTuningConfig", num_virtual_tokens=3)()
    with pytest.raises(ValueError, match="The PROMPT_TUNING adapters of .* cannot be merged"):
        save_slimmed(model, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def _keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


class Kept(torch.Tensor):
    """A weight of another kind, as quantization leaves it."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Nothing but what making a parameter asks for."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(str(func))


def test_weights_of_another_kind_are_skipped():
    model = build("bert")
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.weight = torch.nn.Parameter(Kept(layer.weight.detach()), requires_grad=False)
    found = find_structures(model)
    assert [s.name.split(".")[3] for s in found.of_kind("ffn")] == ["1"] and len(found.of_kind("mha")) == 2
    (skipped,) = found.skipped
    assert skipped.reason == (
        "bert.encoder.layer.0.intermediate.dense.weight is kept as Kept, a kind of tensor of its own, as after "
        "quantization: slim the model before"
    )


def test_parameters_of_a_class_of_their_own_are_plain():
    class Marked(torch.nn.Parameter):
        pass

    model = build("bert")
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.weight = Marked(layer.weight.detach())
    assert not find_structures(model).skipped
