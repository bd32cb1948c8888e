"""Live compaction proves itself on the batch being trained, and puts back what it should not have cut."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import build, make_batch
from torch import nn
from trainers import (
    EVERY,
    NO_DROPOUT,
    Trajectory,
    dropout_free,
    make_loop,
    make_trainer,
    shapes,
    slim_callback,
    take_steps,
    weights,
)
from transformers import Trainer, TrainerCallback

from hf_slim import SlimConfig, find_structures
from hf_slim.compaction.undo import Undo
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.output_comparison import VerificationError
from hf_slim.training import live_proof
from hf_slim.training.captured_batch import Call, Capture
from hf_slim.training.live_proof import compact_proven, run_calls, undisturbed
from hf_slim.training.slimmer import Slimmer

pytestmark = pytest.mark.usefixtures("blind_discovery")
WRONG = "bert.encoder.layer.1.output.dense"
STEPS = {"slim_start": 3, "slim_end": 9, "slim_frequency": 2, "use_cpu": True, "optim": "adamw_torch"}


def mix(module, args, output):
    """Divides by the mean over all channels, which is another one when zeros have left."""
    return output / output.abs().mean(-1, keepdim=True)


def make_wrong(model, layers=(1,)):
    """A model that mixes the units of some FFNs where no code of a class says so."""
    for number in layers:
        model.bert.encoder.layer[number].intermediate.register_forward_hook(mix)
    return model


def run(model, folder, *, live, callbacks=(), **settings):
    trainer = make_trainer(model, folder, slim_live=live, **{**STEPS, **settings})
    trajectory = Trajectory()
    trajectory.watched = slim_callback(trainer)
    for callback in (*callbacks, trajectory):
        trainer.add_callback(callback)
    trainer.train()
    return trainer, trajectory


@pytest.fixture
def warned(monkeypatch):
    """The warnings of live compaction."""
    messages = []
    for module in ("slimmer", "removed_units", "undecided_units"):
        monkeypatch.setattr(f"hf_slim.training.{module}.logger.warning", messages.append)
    return messages


@pytest.fixture
def proofs(monkeypatch):
    """For every proof that was made the names of the structures, and how the model was called."""
    made = []

    def compact(model, structures, masks, optimizer, calls):
        proof = compact_proven(model, structures, masks, optimizer, calls)
        made.append((sorted(s.name for s in structures), calls, proof))
        return proof

    monkeypatch.setattr("hf_slim.training.removed_units.compact_proven", compact)
    return made


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_every_pruning_step_is_proven(family, optim, tmp_path, proofs, warned):
    if optim != "adamw_torch" and family != "bert":
        pytest.skip("optimizers are tried on one family")
    trainer, _ = run(build(family, spread=0.1), tmp_path, live=True, optim=optim)
    assert len(proofs) >= 3 and all(proof.gap is None for _, _, proof in proofs)
    assert slim_callback(trainer).slimming.unproven == set() and warned == []


def test_auto_goes_on_with_zeros(tmp_path, warned):
    masked, trajectory = run(make_wrong(dropout_free()), tmp_path / "masked", live=False, slim_scope="local")
    assert warned == []
    auto, other = run(make_wrong(dropout_free()), tmp_path / "auto", live="auto", slim_scope="local")
    assert (other.losses, other.sizes) == (trajectory.losses, trajectory.sizes)
    expected = weights(masked.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(auto.model).items())
    for parameter, other in zip(masked.model.parameters(), auto.model.parameters(), strict=True):
        states = (trainer.optimizer.optimizer.state[p] for trainer, p in ((masked, parameter), (auto, other)))
        one, two = states
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert len(warned) == 1 and warned[0].startswith(
        f"Without the dropped units of {WRONG} the model does not compute"
    )
    assert "leave them out with slim_exclude" in warned[0]
    slimming = slim_callback(auto).slimming
    assert not slimming.is_live and slimming.unproven == set()
    assert slim_callback(auto).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert not hasattr(auto.model.config, "slim") and not hasattr(auto.model.config, "hf_slim")


def test_several_are_named(tmp_path, warned):
    model = build("bert", spread=0.1, num_hidden_layers=4, **NO_DROPOUT["bert"])
    run(make_wrong(model, (0, 3)), tmp_path, live="auto", slim_scope="local")
    names = "bert.encoder.layer.0.output.dense, bert.encoder.layer.3.output.dense"
    assert len(warned) == 1 and warned[0].startswith(f"Without the dropped units of {names} the model")


def test_without_the_wrong_structure_it_is_live(tmp_path, warned):
    trainer, _ = run(make_wrong(dropout_free()), tmp_path, live="auto", slim_exclude=[WRONG])
    assert slim_callback(trainer).slimming.is_live and warned == []


def remember(model, optimizer):
    """All that compaction changes, as values."""
    attributes = {}
    for name, module in model.named_modules():
        kept = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool, tuple))}
        attributes[name] = (type(module), kept, id(getattr(module, "config", None)))
    state = [{k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in model.parameters()]
    return weights(model), attributes, copy.deepcopy(vars(model.config)), state


def assert_same(one, other):
    for before, after in ((one[0], other[0]), *zip(one[3], other[3], strict=True)):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert one[1:3] == other[1:3]


@pytest.mark.parametrize("break_at", [0, 1])
def test_true_puts_all_back_and_raises(break_at):
    """At the first pruning step, and at a later one, when the config has a record already."""
    model = dropout_free().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"slim_start": 2, "slim_end": 5, "slim_frequency": 1, "slim_round_to": 8}
    config = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_scope="local", slim_live=True, **settings)
    slimming = Slimmer(model, config, 10)
    for step in range(1, 6):
        if step == 2 + break_at:
            make_wrong(model)
        slimming.watch(model, step)
        model(**make_batch(model, seed=step)).loss.backward()
        slimming.score(model, step, may_be_skipped=False)
        optimizer.step()
        before = remember(model, optimizer), {name: mask.clone() for name, mask in slimming.masks.items()}
        if step == 2 + break_at:
            break
        slimming.advance(model, optimizer, step, skipped=False)
        optimizer.zero_grad()
    assert (slimming.sparsities()["ffn2_sparsity"] > 0) == (break_at > 0)
    with pytest.raises(VerificationError, match=f"Without the dropped units of {WRONG} the model does not compute"):
        slimming.advance(model, optimizer, step, skipped=False)
    assert_same(before[0], remember(model, optimizer))
    assert all(torch.equal(mask, slimming.masks[name]) for name, mask in before[1].items())


class WrongLater(TrainerCallback):
    """Makes a model wrong when some units have left it."""

    def __init__(self, step):
        self.step, self.handle = step, None

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step >= self.step and self.handle is None:
            self.handle = model.bert.encoder.layer[1].intermediate.register_forward_hook(mix)


def test_zeros_beside_units_that_are_gone(tmp_path, warned):
    """What was right has left the model; from the step that is wrong on, the rest stays, also after resuming."""
    settings = {**EVERY, "save_steps": 2, "slim_round_to": 4}
    masked, trajectory = run(
        dropout_free(),
        tmp_path / "masked",
        live=False,
        callbacks=[WrongLater(4)],
        **settings,
        slim_criterion="magnitude",
    )
    settings["slim_criterion"] = "magnitude"
    auto, other = run(dropout_free(), tmp_path / "auto", live="auto", callbacks=[WrongLater(4)], **settings)
    assert len(warned) == 1 and WRONG in warned[0]
    slimming = slim_callback(auto).slimming
    assert slimming.is_live and not slimming._units.removes and slimming.unproven == set()
    assert other.sizes[0] > other.sizes[3] == other.sizes[-1]
    for step, (masks, others) in enumerate(zip(trajectory.masks, other.masks, strict=True)):
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items()), step
    for step in (4, 6, 10):
        resumed = make_trainer(dropout_free(seed=5), tmp_path / "auto", slim_live="auto", **{**STEPS, **settings})
        resumed.add_callback(WrongLater(4))
        resumed.train(resume_from_checkpoint=str(tmp_path / "auto" / f"checkpoint-{step}"))
        expected = weights(auto.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed.model).items()), step
        masks = slim_callback(auto).masks
        assert all(torch.equal(mask, masks[name]) for name, mask in slim_callback(resumed).masks.items())
    structures = [slimming.shape.find_current(s.name) for s in slimming.plan.structures]
    before = weights(auto.model)
    zero_units(auto.model, structures, slimming.masks_left)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(auto.model).items())
    again = make_trainer(auto.model, tmp_path / "again", slim_live="auto", **STEPS)
    assert not any(hook is mix for m in auto.model.modules() for hook in m._forward_pre_hooks.values())
    again.train()
    assert not slim_callback(again).slimming._units.removes


class Inner(Trainer):
    """Calls a model inside the one that it trains."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        output = model.bert(**inputs)
        return nn.functional.cross_entropy(model.classifier(output.pooler_output), labels)


class Twice(Trainer):
    """Calls the model twice."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(**inputs).loss + model(**{name: value[:1] for name, value in inputs.items()}).loss


class Forward(Trainer):
    """Calls the forward method, which is no call of the module."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model.forward(**inputs).loss


@pytest.mark.parametrize("trainer_class, path", [(Inner, "bert"), (Twice, ""), (Forward, "bert"), (Trainer, "")])
def test_the_outermost_call_is_kept(trainer_class, path, tmp_path, proofs, warned):
    trainer, _ = run(dropout_free(), tmp_path, live=True, trainer_class=trainer_class, gradient_accumulation_steps=2)
    assert [[call.path for call in calls] for _, calls, _ in proofs] == [[path]] * len(proofs) and len(proofs) >= 3
    rows = {next(iter((*calls[0].args, *calls[0].kwargs.values()))).shape[0] for _, calls, _ in proofs}
    assert rows == {1 if trainer_class is Twice else 4}
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    assert slim_callback(trainer).slimming.unproven == set() and warned == []


class Uncalled(Trainer):
    """Never calls a transformers model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        hidden = model.bert.embeddings(inputs["input_ids"])
        hidden = model.bert.encoder(hidden, attention_mask=None).last_hidden_state
        return nn.functional.cross_entropy(model.classifier(hidden[:, 0]), inputs["labels"])


def test_a_model_that_is_not_called(tmp_path, proofs, warned):
    trainer, _ = run(dropout_free(), tmp_path, live=True, trainer_class=Uncalled)
    names = {s.name for s in find_structures(dropout_free()).structures}
    assert proofs == [] and slim_callback(trainer).slimming.unproven == names
    assert warned == [
        "The removal of units is not proven on the batch of the training: the model was not called as a module in "
        "the step, or only with a cache.",
        f"The removal of units is not proven for {', '.join(sorted(names))}.",
    ]


class EncoderOnly(Trainer):
    """Trains the encoder of a sequence-to-sequence model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model.get_encoder()(input_ids=inputs["input_ids"]).last_hidden_state.square().mean()


def test_what_the_batch_does_not_reach_is_named(tmp_path, warned):
    model = build("t5", spread=0.1)
    settings = {"slim_criterion": "magnitude", "slim_scope": "local"}
    trainer, _ = run(model, tmp_path, live=True, trainer_class=EncoderOnly, **settings)
    names = {s.name for s in find_structures(model).structures if s.name.startswith("decoder")}
    slimming = slim_callback(trainer).slimming
    assert slimming.unproven == names and len(names) >= 2
    assert warned == [f"The removal of units is not proven for {', '.join(sorted(names))}."]
    assert slimming.to_state()["unproven"] == sorted(names)


def test_half_precision_is_compared_in_float32(tmp_path, proofs, warned):
    """And only when a structure loses units for the first time, and at the last step."""
    model = dropout_free().bfloat16()
    trainer, _ = run(model, tmp_path / "right", live=True, slim_scope="local", learning_rate=1e-2)
    assert [names for names, _, _ in proofs][0] == sorted(s.name for s in find_structures(model).structures)
    assert len(proofs) == 2 and warned == []
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    run(make_wrong(dropout_free().bfloat16()), tmp_path / "wrong", live="auto")
    assert len(warned) == 1 and WRONG in warned[0]


def test_autocast_takes_no_part(tmp_path, proofs, warned, monkeypatch):
    outputs = []

    def run_all(model, calls, dtype, structures):
        found = run_calls(model, calls, dtype, structures)
        outputs.append((dtype, {tensor.dtype for tensor in (*found.outputs.values(), *found.inner.values())}))
        return found

    monkeypatch.setattr(live_proof, "run_calls", run_all)
    seen = set()
    model = dropout_free()
    model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, args, output: seen.add((module.training, output.dtype))
    )
    trainer, _ = run(model, tmp_path, live=True, bf16=True)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert set(map(str, outputs)) == {"(torch.float32, {torch.float32})"} and len(proofs) >= 2 and warned == []


def test_compiled_models_are_proven_uncompiled(tmp_path, proofs, warned):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer, _ = run(dropout_free(), tmp_path, live=True, **settings)
    assert len(proofs) >= 3 and all(len(calls) == 1 for _, calls, _ in proofs)
    assert slim_callback(trainer).slimming.unproven == set() and warned == []


def test_float64_decides(monkeypatch):
    """A model that amplifies rounding in float32 is not refused; one that differs is, in both."""
    model = dropout_free()
    structures = find_structures(model).structures
    masks = {s.name: torch.arange(s.units) < s.units // 2 for s in structures}
    noise = iter(range(100))

    def amplify(module, args, output):
        if output.dtype == torch.float32:
            return output + next(noise)
        return output

    model.classifier.register_forward_hook(amplify)
    calls = [Call("", (), make_batch(model))]
    other = copy.deepcopy(model)
    proof = compact_proven(model, structures, masks, None, calls)
    assert [s.units for s in proof.structures] == [s.units // 2 for s in structures]
    make_wrong(other)
    with pytest.raises(VerificationError, match=f"units of {WRONG} the model"):
        compact_proven(other, structures, masks, None, calls)
    assert shapes(other) == shapes(dropout_free())


def test_a_batch_that_gives_nothing_to_compare(tmp_path, warned):
    model = dropout_free()
    model.classifier.register_forward_hook(
        lambda module, args, output: output if module.training else output * float("nan")
    )
    trainer, _ = run(model, tmp_path, live=True)
    assert slim_callback(trainer).slimming.is_live
    assert len(warned) == 2 and "not proven on the batch of the training: The masked model's lo" in warned[0]


def test_a_slim_model_that_cannot_run(tmp_path, warned):
    def need(module, args, output):
        return output.view(-1, 64).view(output.shape)

    model = dropout_free()
    model.bert.encoder.layer[1].intermediate.register_forward_hook(need)
    trainer, _ = run(model, tmp_path, live="auto", slim_round_to=4)
    assert len(warned) == 1 and f"units of {WRONG} the model" in warned[0] and "RuntimeError: shape" in warned[0]
    assert shapes(trainer.model) == shapes(dropout_free())


class Restless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(2))
        self.calls, self.last = 0, None

    def forward(self, value):
        self.calls += 1
        self.last = value
        self.seen += 1
        self.seen = self.seen + torch.rand(2)
        random.random()
        np.random.rand()
        return nn.functional.dropout(self.norm(self.linear(value)), 0.5, self.training)


def test_nothing_is_left_of_a_run():
    model = Restless()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffer, states = model.seen, (torch.get_rng_state(), random.getstate(), np.random.get_state())
    calls = [Call("", (torch.ones(4, 3),), {})]
    first, second = (run_calls(model, calls, torch.float32) for _ in range(2))
    assert torch.equal(first.outputs["output"], second.outputs["output"]) and first.called == set(model.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert model.seen is buffer and (model.calls, model.last) == (0, None)
    assert model.training and not model.norm.training
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert all(np.array_equal(one, other) for one, other in zip(states[2], np.random.get_state(), strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError), undisturbed(model):
        model(torch.randn(4, 5))
    assert model.calls == 0 and model.seen is buffer


@pytest.mark.parametrize("cut", ["nothing", "all"])
def test_cuttings_come_back_bit_for_bit(family, cut):
    from hf_slim.compaction.cut_tensors import compact_model

    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**make_batch(model)).loss.backward()
    optimizer.step()
    structures = find_structures(model).structures
    masks = {s.name: torch.arange(s.units) % 2 == 0 for s in structures}
    before = remember(model, optimizer)
    undo = Undo(model, optimizer)
    undo.keep(structures, masks)
    zero_units(model, structures, masks)
    if cut == "all":
        compact_model(model, structures, masks, optimizer)
        assert shapes(model) != {name: tuple(tensor.shape) for name, tensor in before[0].items()}
    undo.put_back()
    assert_same(before, remember(model, optimizer))


def test_calls_without_gradients_do_not_replace_those_with():
    model = build("bert")
    batch, other = make_batch(model), make_batch(model, seed=9)
    capture = Capture()
    for calls in ([other, batch, other], [batch, other]):
        capture.begin(model)
        for given in calls:
            with torch.set_grad_enabled(given is batch):
                model(**given)
        (kept,) = capture.end()
        assert kept.path == "" and torch.equal(kept.kwargs["input_ids"], batch["input_ids"])
    capture.begin(model)
    with torch.no_grad():
        model(**other)
    model.bert(input_ids=batch["input_ids"])  # a loss that calls only this
    (kept,) = capture.end()
    assert kept.path == "bert"


@pytest.mark.parametrize("live", [True, "auto"])
@pytest.mark.parametrize("use", ["generate", "cache"])
def test_a_cache_does_not_end_live_compaction(live, use, warned):
    """Text is generated before the step, or the batch is computed in two halves."""
    model, optimizer, slimmer = make_loop(family="gpt2", slim_live=live)
    for step in range(1, 13):
        batch = make_batch(model, seed=step)
        if use == "generate":
            model(**batch).loss.backward()
            model.eval().generate(batch["input_ids"][:2, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
            model.train()
        else:
            half = batch["input_ids"].shape[1] // 2
            first, second = batch["input_ids"][:, :half], batch["input_ids"][:, half:]
            cache = model(input_ids=first, use_cache=True).past_key_values
            model(input_ids=second, past_key_values=cache, labels=second).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert slimmer.is_live and slimmer.unproven == set() and warned == []


def test_an_interrupted_proof_leaves_all_as_it_was(monkeypatch):
    model, optimizer, slimmer = make_loop(slim_live=True)
    take_steps(model, optimizer, [1])
    before = slimmer.sparsities(), list(slimmer._events), model.num_parameters()
    runs = []

    def interrupt(module, *_):
        runs.append(torch.is_grad_enabled())
        if runs == [True, False, False]:  # the training step, the masked model, the slim one
            raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        take_steps(model, optimizer, [2])
    assert (slimmer.sparsities(), slimmer._events, model.num_parameters()) == before
    assert all(mask.all() for mask in slimmer.masks.values())
    handle.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    optimizer.zero_grad()
    take_steps(model, optimizer, range(3, 13))
    assert slimmer.sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert model.num_parameters() < before[2]


def test_a_capture_keeps_copies_without_graphs():
    model = build("t5")
    batch = make_batch(model)
    capture = Capture()
    capture.begin(model)
    encoded = model.get_encoder()(input_ids=batch["input_ids"])
    model(encoder_outputs=encoded, **batch)
    first, second = capture.end()
    assert (first.path, second.path) == ("encoder", "")
    kept = second.kwargs["encoder_outputs"].last_hidden_state
    assert not kept.requires_grad and torch.equal(kept, encoded.last_hidden_state)
    batch["input_ids"].zero_()
    assert second.kwargs["input_ids"].any()
    assert not any(module._forward_pre_hooks for module in model.modules())
