"""What is dropped stays dropped, whatever else writes weights; what keeps copies of weights while shapes change."""

import pytest
import torch
from conftest import build
from torch.optim.swa_utils import AveragedModel
from trainers import EVERY, dropout_free, make_trainer, shapes, slim_callback, weights
from transformers import TrainerCallback

from hf_slim import find_structures, model_slim, save_slimmed
from hf_slim.compaction.zeros import find_zero_units
from hf_slim.parallel.shards import find_shards
from hf_slim.training.dropped_units import Step
from hf_slim.training.model_shape import ModelShape
from hf_slim.training.weight_copies import find_copy
from hf_slim.training.zeroed_units import ZeroedUnits

COME_BACK = "Dropped units of bert.encoder.layer.0.output.dense, "


class Lookahead(torch.optim.AdamW):
    """Goes halfway to where it was every third step (Zhang et al. 2019), with slow weights in lists of its own."""

    def __init__(self, params, every=3):
        super().__init__(params, lr=1e-3)
        self.every, self.number = every, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.number += 1
        if self.number % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for parameter, kept in zip(group["params"], slow, strict=True):
                    kept.add_(parameter - kept, alpha=0.5)
                    parameter.copy_(kept)


class NowAndThen(torch.optim.SGD):
    """Adds noise to every weight at some steps."""

    def __init__(self, params, steps=(10,)):
        super().__init__(params, lr=1e-3)
        self.steps, self.number = steps, 0

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.number += 1
        if self.number in self.steps:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=1e-3)


class Averages(TrainerCallback):
    """Averages the weights of all steps, and writes the averages back at the end."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.2)

    def on_train_end(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.average[name])


class Swa(TrainerCallback):
    """Averages by PyTorch's own class, from a step on."""

    def __init__(self, start=0):
        self.start, self.averaged = start, None

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step >= self.start:
            self.averaged = self.averaged or AveragedModel(model)
            self.averaged.update_parameters(model)


class Loads(TrainerCallback):
    """Loads the weights of the beginning at a step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.first = weights(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 10:
            model.load_state_dict(self.first)


class Counts(TrainerCallback):
    """How many dropped units are not zero, at every step and when an evaluation begins or a checkpoint is written."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.evaluated, self.saved = trainer, [], [], []

    def count(self):
        if slim_callback(self.trainer).slimming.is_live:
            return 0
        masks = slim_callback(self.trainer).masks
        whole = find_zero_units(self.trainer.model, find_structures(self.trainer.model).structures, whole=True)
        return sum(int((whole[name] & ~mask).sum()) for name, mask in masks.items())

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.count())

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(self.count())

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(self.count())


@pytest.fixture
def told(monkeypatch):
    """The warnings and what else is logged."""
    messages = []
    for module in ("slimmer", "removed_units", "undecided_units"):
        for kind in ("info", "warning"):
            monkeypatch.setattr(f"hf_slim.training.{module}.logger.{kind}", messages.append)
    return messages


def prepare(folder, *, live, optimizer=None, callbacks=(), **settings):
    settings = {"use_cpu": True, "slim_live": live, **settings}
    trainer = make_trainer(dropout_free(), folder, **settings)
    if optimizer is not None:
        trainer.optimizer = optimizer(trainer.model.parameters())
    counts = Counts(trainer)
    for callback in (*callbacks, counts):
        trainer.add_callback(callback)
    return trainer, counts


def test_slow_weights(tmp_path, told):
    """They come back at step 3, before the pruning step 3 looks; from there on they are written after every step."""
    settings = {"slim_start": 2, "slim_end": 8, "slim_frequency": 1, "slim_scope": "local"}
    trainer, counts = prepare(tmp_path, live=False, optimizer=Lookahead, **settings)
    trainer.train()
    assert counts.steps == [0] * 12
    assert len(told) == 1 and told[0].startswith(COME_BACK) and "have come back" in told[0]
    model_slim(trainer.model, round_multiplier=8)
    assert [s.units for s in find_structures(trainer.model).structures] == [2, 32, 2, 32]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_noise_is_gone_before_evaluations_and_checkpoints(strategy, tmp_path, told):
    """The noise of step 10 is written over at step 11, and what comes then at once; or at the end of the epoch."""
    settings = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 11, "save_steps": 11}
    settings |= {"max_steps": 16} if strategy == "epoch" else {}
    settings |= {"optimizer": lambda params: NowAndThen(params, (10, 11) if strategy == "steps" else (10,))}
    trainer, counts = prepare(tmp_path, live=False, slim_scope="local", **settings)
    trainer.train()
    assert counts.steps[9] > 0 and (counts.steps[-1] > 0) == (strategy == "epoch")
    assert set(counts.evaluated + counts.saved) == {0} and len(counts.saved) >= 1
    assert len(told) == 1 and told[0].startswith(COME_BACK)
    step = {"steps": 11, "epoch": 16}[strategy]
    loaded = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{step}")
    whole = find_zero_units(loaded, find_structures(loaded).structures, whole=True)
    assert all(torch.equal(mask, whole[name]) for name, mask in slim_callback(trainer).masks.items())


def test_noise_is_gone_at_the_end(tmp_path, told):
    trainer, counts = prepare(tmp_path, live=False, optimizer=NowAndThen, slim_scope="local")
    trainer.train()
    assert counts.steps[9] == counts.steps[11] > 0 == counts.count() and len(told) == 1


@pytest.mark.parametrize("is_before", [True, False])
def test_averages_that_are_written_back(is_before, tmp_path, told):
    trainer, counts = prepare(tmp_path, live=False, slim_scope="local")
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0 if is_before else len(callbacks), Averages())
    trainer.train()
    slimming = slim_callback(trainer).slimming
    assert counts.count() == 0 and slimming.restore_zeros(trainer.model) == []
    assert len(told) == 1 and told[0].startswith(COME_BACK)


def test_weights_that_are_loaded(tmp_path, told):
    trainer, counts = prepare(tmp_path, live=False, callbacks=[Loads()], slim_scope="local")
    trainer.train()
    assert counts.steps[8:] == [0, counts.steps[9], counts.steps[9], counts.steps[9]] and counts.count() == 0
    assert counts.steps[9] > 0 and len(told) == 1


@pytest.mark.parametrize("live", [False, "auto"])
def test_nothing_is_told_where_nothing_comes_back(family, live, tmp_path, told):
    trainer = make_trainer(build(family, spread=0.1), tmp_path, slim_live=live, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert told == []


def test_only_what_came_back_is_written_after_every_step():
    model = build("bert")
    structures = find_structures(model).structures
    masks = {s.name: torch.arange(s.units) < s.units // 2 for s in structures}
    units = ZeroedUnits(ModelShape(model), find_shards(model))
    units.apply(model, masks, None, Step())
    assert units.restore(model) == [] and units._restless == set()
    name = "bert.encoder.layer.0.output.dense"
    model.get_parameter(f"{name}.weight").data[:, -1] = 1.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert units.restore(model) == [name]
    assert units._restless == {(f"{name}.weight", 1)}
    changed = [key for key, value in model.state_dict().items() if not torch.equal(before[key], value)]
    assert changed == [f"{name}.weight"]
    units.apply(model, masks, None, Step())
    assert units._restless == {(f"{name}.weight", 1)}


COPIES = [
    ("AveragedModel in a callback", {"callbacks": [Swa]}, "Swa"),
    ("averages in a callback", {"callbacks": [Averages]}, "Averages"),
    ("slow weights of an optimizer", {"optimizer": Lookahead}, "Lookahead"),
]


@pytest.mark.parametrize("settings, holder", [case[1:] for case in COPIES], ids=[case[0] for case in COPIES])
def test_auto_keeps_zeros_where_copies_are_kept(settings, holder, tmp_path, told):
    settings = {**settings, "callbacks": [make() for make in settings.get("callbacks", ())]}
    trainer, _ = prepare(tmp_path, live="auto", slim_scope="local", **settings)
    trainer.train()
    assert shapes(trainer.model) == shapes(dropout_free()) and not slim_callback(trainer).slimming.is_live
    assert told[0] == (
        f"Dropped units stay in the model as zeros until it is saved: {holder} keeps a copy of the weights of "
        "bert.encoder.layer.0.output.dense."
    )
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


@pytest.mark.parametrize("settings, holder", [case[1:] for case in COPIES], ids=[case[0] for case in COPIES])
def test_true_says_what_to_do_where_sizes_do_not_match(settings, holder, tmp_path):
    settings = {**settings, "callbacks": [make() for make in settings.get("callbacks", ())]}
    trainer, _ = prepare(tmp_path, live=True, **settings)
    with pytest.raises(RuntimeError, match=f"Units have left the model .* {holder} seems to .* slim_live=False"):
        trainer.train()
    assert slim_callback(trainer).trainer is None


def test_a_copy_that_is_made_when_some_units_are_gone(tmp_path, told):
    settings = {"slim_start": 2, "slim_end": 8, "slim_frequency": 3, "slim_scope": "local"}
    trainer, _ = prepare(tmp_path, live="auto", callbacks=[Swa(start=3)], **settings)
    trainer.train()
    slimming = slim_callback(trainer).slimming
    assert slimming.is_live and not slimming._units.removes and len(told) == 1 and "Swa keeps a copy" in told[0]
    assert shapes(trainer.model) != shapes(dropout_free())


class Holds(TrainerCallback):
    """Keeps the model itself, and its trainer."""

    def __init__(self, trainer):
        self.trainer, self.model = trainer, trainer.model
        self.parameters = dict(trainer.model.state_dict())


def test_what_is_the_model_itself_is_no_copy(tmp_path):
    trainer, _ = prepare(tmp_path, live="auto", **EVERY)
    trainer.add_callback(Holds(trainer))
    trainer.train()
    assert slim_callback(trainer).slimming.is_live


def test_other_errors_stay_as_they_are(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise RuntimeError("something else")

    trainer, _ = prepare(tmp_path, live=True, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="^something else$"):
        trainer.train()


def test_a_copy_needs_all_tensors_of_a_structure():
    model = build("bert")
    structures = find_structures(model).structures
    holder = Swa()
    holder.averaged = [torch.zeros(64, 32), torch.zeros(32, 64)]
    assert find_copy(model, structures, [holder]) is None
    holder.averaged.append(torch.zeros(64))
    assert find_copy(model, structures, [holder]) == (
        "Swa keeps a copy of the weights of bert.encoder.layer.0.output.dense"
    )


def test_averages_written_back_after_training_are_not_saved(tmp_path, told):
    """`save_slimmed(trainer)` goes by the masks of the training, whatever has become of the weights since."""
    trainer, counts = prepare(tmp_path, live=False)
    before = weights(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        parameter.data.lerp_(before[name], 0.5)
    assert counts.count() > 0
    report = save_slimmed(trainer, tmp_path / "slim")
    assert counts.count() == 0
    assert [message for message in told if "have come back" in message]
    masks = slim_callback(trainer).masks
    assert {s.name: s.after for s in report.structures} == {name: int(mask.sum()) for name, mask in masks.items()}


def test_another_model_in_the_trainer_is_left_alone(tmp_path, told):
    trainer, _ = prepare(tmp_path, live=False)
    trainer.train()
    trainer.model = build("bert", seed=5)
    before = weights(trainer.model)
    report = save_slimmed(trainer, tmp_path / "slim")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())
    assert report.parameters_after == report.parameters_before


@pytest.mark.parametrize("live", [True, False])
def test_what_no_batch_proved_is_in_the_report(live, tmp_path, monkeypatch):
    trainer, _ = prepare(tmp_path, live=live)
    trainer.train()
    name = "bert.encoder.layer.0.output.dense"
    if live:
        monkeypatch.setattr(type(slim_callback(trainer).slimming), "unproven", {name})
    assert save_slimmed(trainer, tmp_path / "slim").unproven == ((name,) if live else ())


class Freezes(TrainerCallback):
    """Freezes a layer for some steps, in which units leave it."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step in (4, 8):
            model.bert.encoder.layer[0].requires_grad_(state.global_step == 8)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_layer_that_is_frozen_for_a_while(optim, tmp_path):
    """The state that the optimizer holds for it is cut with it."""
    settings = {"slim_start": 2, "slim_end": 8, "slim_frequency": 1, "slim_criterion": "magnitude", "optim": optim}
    trainers = []
    for live in (True, False):
        trainer, _ = prepare(tmp_path / str(live), live=live, callbacks=[Freezes()], **settings)
        trainer.train()
        trainers.append(trainer)
    live, masked = trainers
    for parameter, state in live.optimizer.optimizer.state.items():
        assert {v.shape for v in state.values() if torch.is_tensor(v) and v.dim()} <= {parameter.shape}
    model_slim(masked.model, 1)
    for name, tensor in weights(masked.model).items():
        torch.testing.assert_close(weights(live.model)[name], tensor, rtol=1e-4, atol=1e-6)


def test_training_on_with_an_optimizer_from_before_is_refused(tmp_path):
    trainer, _ = prepare(tmp_path, live=False)
    trainer.train()
    save_slimmed(trainer, tmp_path / "slim", inplace=True)
    message = r"The model was made smaller after AdamW had begun: its state 'exp_avg' has the shape .* made anew"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()


@pytest.mark.parametrize("live", [False, "auto"])
def test_what_is_zero_besides_is_removed_too(live, tmp_path):
    """The masks of the training are known; what somebody else has zeroed since is looked for."""
    trainer, _ = prepare(tmp_path, live=live)
    trainer.train()
    expected = {s.name: s.after for s in save_slimmed(trainer, tmp_path / "before").structures}
    name = "bert.encoder.layer.0.output.dense"
    weight = trainer.model.get_parameter(f"{name}.weight")
    kept = weight.any(0).nonzero().flatten()
    assert len(kept) == expected[name]
    with torch.no_grad():
        weight[:, kept[8:]] = 0
    found = {s.name: s.after for s in save_slimmed(trainer, tmp_path / "after").structures}
    assert expected[name] > 8 and found == {**expected, name: 8}


def test_a_model_that_is_made_smaller_after_training_is_left_alone(tmp_path, told):
    trainer, batch = prepare(tmp_path, live=False)
    trainer.train()
    first = save_slimmed(trainer, tmp_path / "one", inplace=True)
    before = weights(trainer.model)
    second = save_slimmed(trainer, tmp_path / "two")
    assert (second.parameters_before, second.parameters_after) == (first.parameters_before, first.parameters_after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())
    assert not [message for message in told if "come back" in message]


@pytest.mark.parametrize("change", ["dropped", "reversed"])
def test_layers_that_are_dropped_or_change_places_after_training(change, tmp_path, told):
    trainer, _ = prepare(tmp_path, live=False, slim_scope="local")
    trainer.train()
    encoder = trainer.model.bert.encoder
    encoder.layer = encoder.layer[:1] if change == "dropped" else encoder.layer[::-1]
    trainer.model.config.num_hidden_layers = len(encoder.layer)
    before = weights(trainer.model)
    report = save_slimmed(trainer, tmp_path / "slim")
    assert [(s.before, s.after) for s in report.structures] == [(4, 2), (64, 32)] * len(encoder.layer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer.model).items())
    assert not [message for message in told if "come back" in message]


def test_a_second_training_gives_the_model_a_config_of_its_own_again(tmp_path):
    trainer, _ = prepare(tmp_path, live="auto", ffn2_sparsity=0.25, mha_sparsity=0.25)
    trainer.train()
    other = type(trainer.model)(trainer.model.config)
    sizes, config = shapes(other), other.config.to_dict()
    again = make_trainer(trainer.model, tmp_path / "again", slim_live="auto")
    again.train()
    assert shapes(again.model) != sizes and other.config.to_dict() == config
    assert shapes(type(other)(other.config)) == sizes
