"""Proof: what is not computed unit by unit is refused, and the model is left exactly as it was."""

import copy
import random
import re

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FAMILIES, STACK, TEXT, build, half_masks, logits, make_batch
from tiny import auto_class_of, build_tiny
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hf_slim import find_structures, model_slim, save_slimmed
from hf_slim.compaction.undo import Undo
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.made_inputs import make_inputs
from hf_slim.proof.output_comparison import VerificationError, compare_models, compute_outputs, widened
from hf_slim.saving.trainer_batches import find_batch

pytestmark = pytest.mark.usefixtures("blind_discovery")

# ------------------------------------------------------------------------------------------------- odd modules


class OddConfig(PreTrainedConfig):
    """The config of a model of one's own."""

    model_type = "odd"

    def __init__(self, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=50, **kwargs):
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.intermediate_size, self.vocab_size = intermediate_size, vocab_size
        super().__init__(**kwargs)


class OddAttention(nn.Module):
    """Attention with usual names; a function sees the outputs of all heads, `[batch, heads, length, size]`."""

    def __init__(self, config, odd):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )
        self.odd = odd

    def forward(self, states):
        shape = (*states.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (f(states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        mixed = self.odd(F.scaled_dot_product_attention(q, k, v))
        return self.o_proj(mixed.transpose(1, 2).reshape(*states.shape[:2], -1))


class OddMlp(nn.Module):
    """A feed-forward network with usual names; a function sees all channels."""

    def __init__(self, config, odd):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.odd = odd

    def forward(self, states):
        return self.fc2(self.odd(F.gelu(self.fc1(states))))


class OddLayer(nn.Module):
    def __init__(self, config, heads, channels):
        super().__init__()
        self.attention, self.mlp = OddAttention(config, heads), OddMlp(config, channels)

    def forward(self, states):
        states = states + self.attention(states)
        return states + self.mlp(states)


class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config, heads=lambda x: x, channels=lambda x: x, layers=1):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OddLayer(config, heads, channels) for _ in range(layers))
        self.post_init()

    def forward(self, input_ids):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return {"states": states}


class Plain(nn.Module):
    """A module of one's own that is no transformers model."""

    def __init__(self, odd=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = OddMlp(OddConfig(), odd)

    def forward(self, x):
        return self.mlp(x)


HEADS = {
    "softmax over heads": lambda x: x.softmax(1),
    "mean over heads": lambda x: x - x.mean(1, keepdim=True),
    "heads rolled": lambda x: x.roll(1, 1),
    "heads flipped": lambda x: x.flip(1),
    "scale by the heads": lambda x: x / x.shape[1],
    "norm over all heads": lambda x: F.layer_norm(x, (x.shape[1], *x.shape[2:])),
}
CHANNELS = {
    "norm over channels": lambda x: F.layer_norm(x, x.shape[-1:]),
    "softmax over channels": lambda x: x.softmax(-1),
    "channels rolled": lambda x: x.roll(1, -1),
    "mean over channels": lambda x: x - x.mean(-1, keepdim=True),
    "scale by the channels": lambda x: x * x.shape[-1],
}
ODD = {
    **{name: ({"heads": function}, "layers.0.attention.o_proj") for name, function in HEADS.items()},
    **{name: ({"channels": function}, "layers.0.mlp.fc2") for name, function in CHANNELS.items()},
}


def make_odd(layers=1, **functions):
    """A masked odd model with gradients, in training mode, and one parameter frozen."""
    torch.manual_seed(0)
    model = mask(OddModel(OddConfig(), layers=layers, **functions)).train()
    model(input_ids=torch.arange(6)[None])["states"].sum().backward()
    model.embed.weight.requires_grad_(False)
    return model


def mask(model, seed=2):
    """Spread the weights of a model, and zero half of its units."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures, seed))
    return model


def note(model):
    """All that a model is: objects, values, gradients, attributes, configs."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    configs = {id(v): v for m in model.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)}
    return {
        "tensors": {n: (t, t.detach().clone(), t.dtype, t.stride(), t.requires_grad) for n, t in tensors.items()},
        "gradients": {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "modules": {n: (m, type(m), dict(vars(m))) for n, m in model.named_modules()},
        "hooks": {n: [len(v) for v in vars(m).values() if isinstance(v, dict)] for n, m in model.named_modules()},
        "configs": [(c, copy.deepcopy(c.to_dict()), dict(vars(c))) for c in configs.values()],
        "random": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()),
    }


def assert_same(before, model):
    now = note(model)
    for name, (tensor, value, *facts) in before["tensors"].items():
        assert now["tensors"][name][0] is tensor and now["tensors"][name][2:] == tuple(facts), name
        assert torch.equal(now["tensors"][name][1], value), name
    for name, (gradient, value) in before["gradients"].items():
        assert now["gradients"][name][0] is gradient, name
        assert gradient is None or torch.equal(gradient, value), name
    for name, (module, kind, attributes) in before["modules"].items():
        assert now["modules"][name][:2] == (module, kind), name
        assert now["modules"][name][2].keys() == attributes.keys(), name
        assert all(vars(module)[key] is value for key, value in attributes.items()), name
    assert now["hooks"] == before["hooks"]
    for (config, content, attributes), (other, now_content, now_attributes) in zip(
        before["configs"], now["configs"], strict=True
    ):
        assert config is other and content == now_content and attributes == now_attributes
    assert torch.equal(before["random"][0], now["random"][0]) and before["random"][1] == now["random"][1]
    assert (before["random"][2] == now["random"][2]).all()


@pytest.fixture
def warnings_of_ours(monkeypatch):
    """What the library warns of."""
    messages = []
    for module in ("compaction.sparse_model", "saving.save"):
        monkeypatch.setattr(f"hf_slim.{module}.logger.warning", messages.append)
    return messages


@pytest.mark.parametrize("case", ODD)
def test_what_mixes_units_is_refused_and_left_as_it_was(case):
    functions, name = ODD[case]
    model = make_odd(**functions)
    before = note(model)
    with pytest.raises(
        VerificationError,
        match=rf"states differs from .*\. The difference comes from {re.escape(name)}, which .* slim_exclude when you "
        r"train, .*The model is as it was\.$",
    ):
        model_slim(model, 1)
    assert_same(before, model)


@pytest.mark.parametrize("case", ["softmax over heads", "norm over channels"])
def test_what_mixes_units_is_not_saved(case, tmp_path):
    functions, name = ODD[case]
    model = make_odd(**functions)
    before = note(model)
    with pytest.raises(VerificationError, match=f"comes from {re.escape(name)}, .* Nothing was saved"):
        save_slimmed(model, tmp_path / "slim")
    assert_same(before, model)
    assert list(tmp_path.iterdir()) == []


def test_the_same_modules_without_mixing_are_slimmed(warnings_of_ours):
    model = make_odd(layers=2)
    expected = compute_outputs(model, {"input_ids": torch.arange(9)[None]})["states"]
    random_state = torch.get_rng_state()
    model_slim(model, 1)
    assert [s.units for s in find_structures(model).structures] == [2, 32, 2, 32]
    assert model.training and torch.equal(torch.get_rng_state(), random_state) and not warnings_of_ours
    slim = compute_outputs(model, {"input_ids": torch.arange(9)[None]})["states"]
    torch.testing.assert_close(slim, expected, rtol=1e-5, atol=1e-5)


def test_only_those_that_make_the_difference_are_named():
    model = make_odd(layers=3)
    model.layers[1].mlp.odd = CHANNELS["softmax over channels"]
    model.layers[2].attention.odd = HEADS["heads rolled"]
    names = r"layers\.2\.attention\.o_proj, layers\.1\.mlp\.fc2|layers\.1\.mlp\.fc2, layers\.2\.attention\.o_proj"
    with pytest.raises(VerificationError, match=f"comes from ({names}), which"):
        model_slim(model, 1)


def test_a_model_that_does_not_run_any_more_is_left_as_it_was():
    model = make_odd(channels=lambda x: x + torch.ones(64))
    before = note(model)
    with pytest.raises(
        VerificationError, match=r"the slimmed one does not: The size .*comes from layers\.0\.mlp\.fc2"
    ):
        model_slim(model, 1)
    assert_same(before, model)


# ------------------------------------------------------------------------------------- modules of one's own


def test_a_plain_module_is_slimmed_with_one_warning(warnings_of_ours):
    model = mask(Plain())
    model_slim(model, 1)
    assert model.mlp.fc1.out_features == 32
    assert len(warnings_of_ours) == 1
    assert re.search(
        r"not proven .*Plain is no transformers model.* verify=\{\.\.\.\}, or verify=False", *warnings_of_ours
    )


def test_a_plain_module_is_compared_on_a_batch(warnings_of_ours):
    batch = {"x": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}
    model = mask(Plain(CHANNELS["norm over channels"]))
    before = note(model)
    with pytest.raises(VerificationError, match=r"output differs .* comes from mlp\.fc2"):
        model_slim(model, 1, verify=batch)
    assert_same(before, model)
    assert model_slim(mask(Plain()), 1, verify=batch).mlp.fc1.out_features == 32
    assert not warnings_of_ours
    assert model_slim(model, 1, verify=False).mlp.fc1.out_features == 32


def test_a_model_for_which_no_input_can_be_made_is_slimmed_with_one_warning(warnings_of_ours):
    class Strange(OddModel):
        def forward(self, riddle):
            return super().forward(riddle)

    model = mask(Strange(OddConfig()))
    model_slim(model, 1)
    (message,) = warnings_of_ours
    assert re.search(r"not proven .*Strange takes riddle, .* verify=\{'riddle': \.\.\.\}, or verify=False", message)


def test_the_models_in_a_module_are_compared_each():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([make_odd(), make_odd(channels=CHANNELS["channels rolled"])])

    holder = Holder()
    before = note(holder)
    with pytest.raises(VerificationError, match=r"OddModel 1: states differs .* from parts\.1\.layers\.0\.mlp\.fc2,"):
        model_slim(holder, 1)
    assert_same(before, holder)


@pytest.mark.parametrize(
    ("verify", "message"),
    [
        ("yes", "verify must be True, False or a batch .* got 'yes'"),
        ({}, "verify must be True, False or a batch"),
        ({1: 2}, r"verify: the inputs of a batch are named by strings, got \[1\]"),
        ({"pixels": torch.ones(1)}, r"OddModel cannot run on pixels \(1,\): .*Pass a batch"),
    ],
)
def test_bad_batches_are_refused(verify, message):
    model = make_odd()
    before = note(model)
    with pytest.raises(ValueError, match=message):
        model_slim(model, 1, verify=verify)
    assert_same(before, model)


def test_a_model_without_zero_units_is_left_with_a_warning(warnings_of_ours):
    model = build("bert")
    model_slim(model)
    assert "no unit of the model is zero" in warnings_of_ours[0] and len(warnings_of_ours) == 1


# ------------------------------------------------------------------------------------------------ put back whole


class Interruption(KeyboardInterrupt):
    """Somebody presses Ctrl+C."""


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("where", ["half way", "record", "comparison"])
def test_whatever_is_raised_the_model_is_as_it_was(family, where, verify, monkeypatch):
    model = mask(build(family)).train()
    model(**make_batch(model)).loss.backward()
    count = iter(range(99))

    def interrupt(*args, **kwargs):
        raise Interruption

    if where == "half way":
        from hf_slim.compaction import cut_tensors as compaction

        original = compaction.take_positions
        monkeypatch.setattr(
            compaction, "take_positions", lambda *args: interrupt() if next(count) == 5 else original(*args)
        )
    elif where == "record":
        monkeypatch.setattr("hf_slim.compaction.proven_removal.record_shapes", interrupt)
    elif not verify:
        return
    else:
        monkeypatch.setattr("hf_slim.proof.output_comparison.compare_outputs", interrupt)
    before = note(model)
    with pytest.raises(Interruption):
        model_slim(model, 1, verify=verify)
    assert_same(before, model)


def test_what_is_kept_is_no_larger_than_what_is_cut(family):
    model = mask(build(family))
    structures = find_structures(model).structures
    before = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    undo = Undo(model)
    undo.cut(structures, half_masks(structures))
    removed = before - sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    kept = [piece.values for step in undo._steps for piece in step.args[-1]]
    assert removed > 0 and sum(values.untyped_storage().nbytes() for values in kept) == 4 * removed


@pytest.mark.parametrize("kind", ["part of a larger tensor", "transposed", "in shared memory"])
def test_memory_that_others_see_is_put_back_itself(kind, monkeypatch):
    model = make_odd()
    weight = model.layers[0].mlp.fc2.weight
    if kind == "part of a larger tensor":
        weight.data = torch.cat([weight.data, weight.data])[: len(weight)]
    elif kind == "transposed":
        weight.data = weight.data.t().contiguous().t()
    else:
        weight.data.share_memory_()
    before, pointer = note(model), weight.data_ptr()
    monkeypatch.setattr("hf_slim.compaction.proven_removal.record_shapes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model_slim(model, 1)
    assert_same(before, model)
    assert weight.data_ptr() == pointer


def test_training_goes_on_after_a_refusal():
    """Gradients reach the parameters that were put back, and the optimizer moves them."""
    model = make_odd(channels=CHANNELS["norm over channels"])
    with pytest.raises(VerificationError):
        model_slim(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.zero_grad()
    model(input_ids=torch.arange(6)[None])["states"].sum().backward()
    weight = model.layers[0].mlp.fc1.weight
    expected = weight.detach() - 0.1 * weight.grad
    optimizer.step()
    assert weight.grad.abs().max() > 0
    torch.testing.assert_close(weight.detach(), expected)


# ------------------------------------------------------------------------------------- what comparing leaves


class Remembering(nn.Module):
    """A module whose forward pass counts, replaces and changes things of its own, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1))
        self.calls, self.cache = 0, None

    def forward(self, x):
        self.calls += 1
        self.cache = x
        self.seen += 1
        self.register_buffer("made", torch.ones(1), persistent=False)
        self.register_forward_hook(lambda *_: None)
        return F.dropout(self.norm(x), training=self.training) + self.seen + random.random() + numpy.random.rand()


def test_a_run_leaves_nothing_behind():
    model = Remembering().train()
    before, batch = note(model), {"x": torch.randn(3, 4)}
    random_before = note(model)["random"]
    first = compute_outputs(model, batch)["output"]
    assert torch.equal(first, compute_outputs(model, batch)["output"])
    before["random"] = random_before
    assert_same(before, model)


def test_compiled_models_are_run_as_they_are_written():
    def refuse(*args):
        raise RuntimeError("compiled")

    model = build("bert")
    model.compile(backend=refuse)
    model.bert.encoder = torch.compile(model.bert.encoder, backend=refuse)
    compute_outputs(model, {"input_ids": torch.arange(5)[None]})
    with pytest.raises(Exception, match="compiled"):
        model(input_ids=torch.arange(5)[None])


# ---------------------------------------------------------------------------------------------- precision


def test_half_precision_is_compared_in_float32(monkeypatch):
    """A channel that leans on others by so little that rounding to bfloat16 hides it."""
    right, wrong = make_odd().bfloat16(), make_odd(channels=lambda x: x + 3e-3 * x.mean(-1, keepdim=True)).bfloat16()
    with torch.no_grad():
        plainly = [model.eval()(input_ids=torch.arange(16)[None])["states"].float() for model in (right, wrong)]
    assert (plainly[0] - plainly[1]).abs().max() < 0.02 * plainly[0].abs().max()
    model_slim(right, 1)
    assert {p.dtype for p in right.parameters()} == {torch.bfloat16}
    before = note(wrong)
    with pytest.raises(VerificationError, match=r"comes from layers\.0\.mlp\.fc2"):
        model_slim(wrong, 1)
    assert_same(before, wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_is_exactly_the_model_in_float32(family, dtype):
    model = build(family, spread=0.05).to(dtype)
    batch = make_inputs(model)
    before = note(model)
    with widened(model, torch.float32), torch.no_grad():
        got = model(**batch).logits
    assert_same(before, model)
    wide = copy.deepcopy(model).float()
    wide_batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
    assert torch.equal(got, logits(wide, wide_batch))
    assert torch.equal(compute_outputs(model, batch)["logits"], got)


@pytest.mark.parametrize(
    "model_type", ["hubert", "squeezebert", "mixtral", "gpt_oss", "xglm", "vits", "mamba", "fnet"]
)
def test_widened_takes_kernels_of_every_kind(model_type):
    """Convolutions and grouped products look at types before they run, and XGLM fills masks with the least number."""
    model = build_tiny(model_type, auto_class_of(model_type))
    inputs = make_inputs(model)
    expected, double = compute_outputs(model, inputs), compute_outputs(model, inputs, torch.float64)
    assert {value.dtype for value in double.values()} == {torch.float64}
    for name, value in expected.items():
        torch.testing.assert_close(value.double(), double[name], rtol=1e-3, atol=1e-3)
    half = copy.deepcopy(model).bfloat16()
    for name, value in compute_outputs(copy.deepcopy(half).float(), inputs).items():
        assert torch.equal(compute_outputs(half, inputs)[name], value)


def test_widened_reaches_what_the_code_casts_down():
    """The norms of Llama, and rotary embeddings, are computed in float32 whatever the type of the weights."""
    model = build("llama", spread=0.05)
    ids = {"input_ids": torch.arange(7)[None]}
    double = copy.deepcopy(model).double()
    with widened(model, torch.float64):
        got = logits(model, ids)
    assert got.dtype == torch.float64 and not torch.equal(got, logits(double, ids))
    slim = model_slim(mask(build("llama")), 1)
    with widened(slim, torch.float64):
        assert logits(slim, ids).dtype == torch.float64


def test_widened_writes_and_views():
    """Places that exist already keep their type; what is made meanwhile is wide."""
    half, module = torch.zeros(4, dtype=torch.bfloat16), nn.Linear(1, 1)
    with widened(module, torch.float32):
        made = torch.zeros(2, dtype=torch.float16)
        made += half[:2] + 1 / 3
        half[2:] = made
        half.index_put_((torch.tensor([0]),), made[:1])
    assert made.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.equal(made, torch.full((2,), 1 / 3))
    assert torch.equal(half, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]).bfloat16())


def test_attention_kernels_of_half_precision_are_not_used_meanwhile():
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with widened(model, torch.float32):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flash_attention_2"


class Amplifying(OddModel):
    """Makes rounding as large as the numbers."""

    def forward(self, input_ids):
        states = super().forward(input_ids)["states"]
        return {"states": torch.sin(1e5 * states)}


def test_float64_decides_where_rounding_is_amplified():
    model = mask(Amplifying(OddConfig(intermediate_size=512)))
    slim = copy.deepcopy(model)
    model_slim(slim, 1)
    batch = {"input_ids": torch.arange(16)[None]}
    one, other = (compute_outputs(m, batch)["states"] for m in (model, slim))
    assert (one - other).abs().max() > 1e-3
    compare_models(model, slim, batch)
    wrong = mask(Amplifying(OddConfig(intermediate_size=512), channels=CHANNELS["channels rolled"]))
    with pytest.raises(VerificationError, match=r"comes from layers\.0\.mlp\.fc2"):
        model_slim(wrong, 1)


def test_a_model_that_accelerate_runs_in_half_precision(tmp_path):
    """The autocast that it wraps around the forward pass is no part of the comparison."""
    model = make_odd()
    trainer = Trainer(model, TrainingArguments(tmp_path, bf16=True, use_cpu=True, report_to="none"))
    trainer.accelerator.prepare_model(model, evaluation_mode=True)
    assert "_original_forward" in vars(model)
    wide = make_odd()
    batch = {"input_ids": torch.arange(9)[None]}
    assert torch.equal(compute_outputs(model, batch)["states"], compute_outputs(wide, batch)["states"])
    model_slim(model, 1)


# --------------------------------------------------------------------------------------- what is not proven


class Branching(OddModel):
    """Has a layer that only other inputs would reach."""

    def forward(self, input_ids, other=None):
        states = self.layers[0](self.embed(input_ids))
        return {"states": states if other is None else self.layers[1](states)}


def test_structures_that_no_input_reaches_are_named(warnings_of_ours):
    model = mask(Branching(OddConfig(), layers=2))
    names = "layers.1.attention.o_proj, layers.1.mlp.fc2"
    slim = copy.deepcopy(model)
    model_slim(slim, 1)
    assert len(warnings_of_ours) == 1
    assert f"model_slim: No input reached {names}, so it is not proven" in warnings_of_ours[0]
    warnings_of_ours.clear()
    model_slim(model, 1, verify={"input_ids": torch.arange(4)[None], "other": torch.ones(1)})
    assert warnings_of_ours == []


def test_the_report_names_what_is_not_proven(tmp_path, warnings_of_ours):
    config = FAMILIES["bert"][2]
    model = mask(transformers.BertModel(transformers.BertConfig(**config, is_decoder=True, add_cross_attention=True)))
    report = save_slimmed(model, tmp_path / "slim")
    names = tuple(f"encoder.layer.{n}.crossattention.output.dense" for n in (0, 1))
    assert report.unproven == names
    assert str(report).splitlines()[-1] == f"not proven: {names[0]}, {names[1]}"
    assert len(warnings_of_ours) == 1 and f"save_slimmed: No input reached {', '.join(names)}" in warnings_of_ours[0]
    batch = {"input_ids": torch.arange(4)[None], "encoder_hidden_states": torch.randn(1, 4, 32)}
    assert save_slimmed(model, tmp_path / "slim", verify=batch).unproven == ()
    unchecked = save_slimmed(model, tmp_path / "slim", verify=False)
    assert unchecked.unproven == tuple(s.name for s in unchecked.structures)
    assert len(warnings_of_ours) == 1


# --------------------------------------------------------------------------------------- the trainer's data


def rows(count, length=7, first=5):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(first, 99, (length,), generator=generator), "labels": n % 2} for n in range(count)
    ]


def make_trainer(tmp_path, model=None, **keywords):
    settings = TrainingArguments(
        tmp_path / "out",
        report_to="none",
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        use_cpu=True,
        max_steps=3,
        **keywords.pop("settings", {}),
    )
    return Trainer(model or mask(build("bert")), settings, **keywords)


class Stream(torch.utils.data.IterableDataset):
    """Counts how often it is begun."""

    begun = 0

    def __iter__(self):
        """Begin anew."""
        Stream.begun += 1
        return iter(rows(20))


class Once(torch.utils.data.IterableDataset):
    """Can be read once only."""

    def __init__(self):
        self.left = iter(rows(20))

    def __iter__(self):
        """Go on."""
        return self

    def __next__(self):
        """The next row."""
        return next(self.left)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train_dataset": rows(20)}, (8, 7)),
        ({"train_dataset": rows(20), "eval_dataset": rows(20, 9)}, (8, 9)),
        ({"eval_dataset": {"one": rows(3, 5), "two": rows(3, 6)}}, (3, 5)),
        ({"eval_dataset": rows(20, 500)}, (4, 500)),
        ({"train_dataset": Stream()}, (8, 7)),
        ({"train_dataset": Once()}, None),
        ({"train_dataset": []}, None),
        ({}, None),
        ({"train_dataset": [{"other": torch.ones(3)}] * 4, "settings": {"remove_unused_columns": False}}, None),
    ],
)
def test_the_first_rows_of_the_data(data, expected, tmp_path):
    trainer = make_trainer(tmp_path, **data)
    before, loaders = note(trainer.model), list(trainer.accelerator._dataloaders)
    references = list(trainer.accelerator.gradient_state.dataloader_references)
    batch = find_batch(trainer, trainer.model)
    assert_same(before, trainer.model)
    assert trainer.accelerator._dataloaders == loaders
    assert trainer.accelerator.gradient_state.dataloader_references == references
    if expected is None:
        assert batch is None
        if isinstance(data.get("train_dataset"), Once):
            assert len(list(data["train_dataset"])) == 20
    else:
        assert {name: tuple(value.shape) for name, value in batch.items()} == {
            "input_ids": expected,
            "labels": expected[:1],
        }


def test_saving_compares_on_the_data_of_the_trainer(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("hf_slim.compaction.proven_removal.make_inputs", lambda model: pytest.fail("inputs were made"))
    original = compute_outputs
    monkeypatch.setattr(
        "hf_slim.compaction.numerical_proof.compute_outputs",
        lambda model, batch, dtype: (seen.append(tuple(batch["input_ids"].shape)), original(model, batch, dtype))[1],
    )
    trainer = make_trainer(tmp_path, train_dataset=rows(20))
    save_slimmed(trainer, tmp_path / "slim")
    assert set(seen) == {(8, 7)}


def test_labels_that_the_model_does_not_take_are_left_out(tmp_path):
    model = mask(transformers.BertModel(build("bert").config))
    trainer = make_trainer(tmp_path, model, train_dataset=rows(20))
    assert list(find_batch(trainer, trainer.model)) == ["input_ids"]


@pytest.mark.parametrize("kind", ["labels of another shape", "outputs that are not finite"])
def test_made_inputs_where_the_batch_does_not_run(kind, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_slim.compaction.proven_removal.logger.info", said.append)
    data = rows(20)
    if kind == "labels of another shape":
        data = [{**row, "labels": torch.tensor([9.0, 9.0, 9.0])} for row in data]
    else:
        data = [{**row, "labels": -100} for row in data]
    report = save_slimmed(make_trainer(tmp_path, train_dataset=data), tmp_path / "slim")
    assert len(said) == 1 and said[0].startswith("Compared on made inputs")
    assert report.unproven == () and report.parameters_after < report.parameters_before


def test_what_only_the_data_shows_is_found(tmp_path):
    """A model that mixes channels where a token stands that made inputs do not have."""

    class Rare(transformers.BertForSequenceClassification):
        def forward(self, input_ids, labels=None):
            for layer in self.bert.encoder.layer:
                layer.intermediate.rare = bool((input_ids == 1).any())
            return super().forward(input_ids, labels=labels)

    class Mixing(type(build("bert").bert.encoder.layer[0].intermediate)):
        def forward(self, states):
            found = super().forward(states)
            return found.roll(1, -1) if self.rare else found

    model = mask(Rare(build("bert").config)).eval()
    for layer in model.bert.encoder.layer:
        layer.intermediate.__class__ = Mixing
    model_slim(copy.deepcopy(model), 1)
    trainer = make_trainer(
        tmp_path,
        model,
        train_dataset=rows(20),
        eval_dataset=[*rows(20), {"input_ids": torch.ones(7).long(), "labels": 0}][::-1],
    )
    with pytest.raises(VerificationError, match="differs from the masked model's by .*Nothing was saved"):
        save_slimmed(trainer, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_norms_that_cast_to_float32_are_no_difference():
    """A model in float64 is held to what float64 can do, also where its code goes through float32."""
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**TEXT, **STACK, num_key_value_heads=2)).double()
    model = mask(model)
    slim = copy.deepcopy(model)
    batch = {"input_ids": torch.arange(5, 14)[None]}
    model_slim(slim, 1, verify=False)
    plain = (logits(model.eval(), batch) - logits(slim.eval(), batch)).abs().max()
    assert plain > 1e-8 * logits(model, batch).abs().max()
    compare_models(model, slim, batch)
    assert len(find_structures(model_slim(model, 1)).structures) == 4


def test_what_the_outputs_hide_is_refused():
    """A head of zeros gives zeros whatever the layers compute: those that read the units are compared, too."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def mix(module, query, key, value, mask, **keywords):
        output, weights = sdpa_attention_forward(module, query, key, value, mask, **keywords)
        return output.roll(1, 2), weights

    AttentionInterface.register("mixes_heads", mix)
    model = build("bert")
    model.classifier.weight.data.zero_()
    model.set_attn_implementation("mixes_heads")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    with pytest.raises(VerificationError, match="what .*attention.output.dense.weight makes, call"):
        model_slim(model, 1)
