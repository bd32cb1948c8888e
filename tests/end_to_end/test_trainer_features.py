"""Slimming beside all else the Trainer does: optimizers, precision, restarts, searches, the best model."""

import dataclasses
import gc
import json
import math
import re

import pytest
import torch
from accelerate.utils import AutocastKwargs
from conftest import build
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from trainers import HALF, ZeroWatch, kept, make_data, make_trainer, slim_callback, watch, weights
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_slim import SlimTrainerCallback, SlimTrainingArguments, find_structures, save_slimmed
from hf_slim.compaction.zeros import find_zero_units

TARGET = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NAMES = [name.value for name in OptimizerNames]
WITHOUT_GRADIENTS = [name for name in NAMES if "lomo" in name or name.endswith("layerwise")]
BUILT_IN = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


@pytest.fixture(autouse=True)
def quick_collection():
    """Every training begins with a garbage collection, slow where so many modules are loaded: leave those out."""
    gc.collect()
    gc.freeze()


class Record(TrainerCallback):
    """Calls a function at the end of each step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, model, **kwargs):
        self.function(state.global_step, model)


class FullWatch(ZeroWatch):
    """Also looks at the weights of every evaluation and of every checkpoint."""

    def __init__(self, callback):
        super().__init__()
        self.watched, self.dropped, self.evaluated, self.saved = [callback], [], [], []

    def count(self, model, masks):
        zero = find_zero_units(model, self.structures, whole=True)
        self.dropped.append(sum(int((~mask).sum()) for mask in masks.values()))
        self.moved += sum(int((zero[name] & ~mask).sum()) for name, mask in masks.items())

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated.append(state.global_step)
        self.count(model, self.watched[0].masks)

    def on_save(self, args, state, control, model, **kwargs):
        self.saved.append(state.global_step)
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        with open(f"{folder}/trainer_state.json") as file:
            saved = json.load(file)["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["saved"]
        masks = {name: mask.clone().fill_(True) for name, mask in self.watched[0].masks.items()}
        for name, units in saved["dropped"].items():
            masks[name][units] = False
        assert all(torch.equal(mask, self.watched[0].masks[name]) for name, mask in masks.items())
        self.count(type(model).from_pretrained(folder), masks)


def make_optimizer_trainer(name, folder, model=None, **settings):
    """A trainer with an optimizer of the Trainer's names; skips where it cannot be made, for the reason it gives."""
    model = model or build("bert", spread=0.05, intermediate_size=128)  # 8-bit states begin at 4096 elements
    settings = {"optim": name, "weight_decay": 0.1, "learning_rate": 1e-2, **settings}
    if name.startswith(("galore", "apollo")):
        settings |= {"optim_args": "rank=4,update_proj_gap=3", "optim_target_modules": "all-linear"}
    elif name in ("sgd", "rmsprop"):
        settings["optim_args"] = "momentum=0.9"
    trainer = make_trainer(model, folder, **settings)
    try:
        trainer.create_optimizer()
    except (ImportError, ValueError, RuntimeError, AssertionError) as error:
        if name in BUILT_IN:
            raise
        pytest.skip(f"{name}: {error}")
    return trainer


def train_or_skip(trainer):
    """Train; skip where the optimizer turns out to need a GPU."""
    try:
        trainer.train()
    except (AssertionError, RuntimeError) as error:
        if torch.cuda.is_available() or not re.search("CUDA|NVIDIA", str(error)):
            raise
        pytest.skip(f"{OptimizerNames(trainer.args.optim).value}: {error}")


def check_whole_schedule(trainer):
    """Train with evaluations at 3, 6, 9, 12 and checkpoints at 4, 8, 12: what is dropped stays zero everywhere."""
    watcher = FullWatch(slim_callback(trainer))
    trainer.add_callback(watcher)
    train_or_skip(trainer)
    total = sum(s.units for s in find_structures(trainer.model).structures) // 2
    assert (watcher.steps, watcher.evaluated, watcher.saved) == (12, [3, 6, 9, 12], [4, 8, 12])
    assert 0 < watcher.dropped[0] < watcher.dropped[2] < total  # steps 3 and 6, while the sparsity rises
    assert watcher.dropped[3:] == [total] * 4
    assert (watcher.moved, watcher.returned) == (0, 0)
    assert slim_callback(trainer).sparsities() == TARGET


EVALUATE_AND_SAVE = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_the_trainer(name, tmp_path):
    criterion = "magnitude" if name in WITHOUT_GRADIENTS else "taylor"
    check_whole_schedule(make_optimizer_trainer(name, tmp_path, slim_criterion=criterion, **EVALUATE_AND_SAVE))


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_optimizers_without_gradients_are_refused_by_gradient_criteria(name, tmp_path):
    trainer = make_optimizer_trainer(name, tmp_path)
    with pytest.raises(RuntimeError, match="At step 1 there is no gradient in any of the 4 .*slim_criterion='magni"):
        train_or_skip(trainer)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", *(name for name in NAMES if "schedule_free" in name)])
def test_activations_that_are_not_zero_at_zero(name, tmp_path):
    """The second linear layer of a dropped channel still gets a gradient, as sigmoid(0) is 0.5."""
    model = build("bert", spread=0.05, hidden_act="sigmoid")
    check_whole_schedule(make_optimizer_trainer(name, tmp_path, model, **EVALUATE_AND_SAVE))


@pytest.mark.parametrize("name", ["schedule_free_adamw", "adamw_8bit", "grokadamw"])
def test_optimizers_with_states_of_their_own_resume(name, tmp_path):
    settings = {**EVALUATE_AND_SAVE, "use_cpu": True}
    whole = make_optimizer_trainer(name, tmp_path, **settings)
    whole.train()
    resumed = make_optimizer_trainer(name, tmp_path, **settings)
    watcher = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (watcher.steps, watcher.moved, watcher.returned) == (8, 0, 0)
    assert kept(resumed) == kept(whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1, "gradient_accumulation_steps": 2},
        {"weight_decay": 0.1, "max_grad_norm": 0.0},
        {"weight_decay": 0.1, "bf16": True, "use_cpu": True},
        {"weight_decay": 0.1, CHECKPOINTING: True},
        {"optim": "adafactor", "weight_decay": 0.1},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_dropped_units_never_move(name, settings, tmp_path):
    trainer = make_trainer(build(name, spread=0.05), tmp_path, max_steps=24, **settings)
    watcher = watch(trainer)
    trainer.train()
    assert (watcher.steps, watcher.moved, watcher.returned) == (24, 0, 0)
    assert slim_callback(trainer).sparsities() == TARGET


def test_a_compiled_model(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "weight_decay": 0.1}
    trainer = make_trainer(build("bert", spread=0.05), tmp_path, **settings)
    watcher = watch(trainer)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert (watcher.steps, watcher.moved, watcher.returned) == (12, 0, 0)
    assert slim_callback(trainer).sparsities() == TARGET
    report = save_slimmed(trainer, tmp_path / "slim")
    assert sum(s.after for s in report.structures if s.kind == "ffn") == 64


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_accumulated_gradients_score_as_one_batch(name, tmp_path):
    changes = NO_DROPOUT if name == "bert" else {}
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            build(name, spread=0.1, **changes),
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.01,
        )
        if name == "bert":  # whose loss takes no number of items, so that the Trainer would add up the batches' means
            trainer.model_accepts_loss_kwargs = False
        callback, steps = slim_callback(trainer), []

        def keep(step, model, callback=callback, steps=steps):
            steps.append((dict(callback.slimming.scores.smoothed), {n: m.clone() for n, m in callback.masks.items()}))

        trainer.add_callback(Record(keep))
        trainer.train()
        assert callback.sparsities() == TARGET
        runs.append(steps)
    for (scores, masks), (others, other_masks) in zip(*runs, strict=True):
        assert scores.keys() == others.keys()
        for structure, values in scores.items():
            torch.testing.assert_close(others[structure], values, rtol=1e-3, atol=1e-5 * float(values.max()))
        assert all(torch.equal(mask, other_masks[structure]) for structure, mask in masks.items())


class Stream(IterableDataset):
    """Examples in their order, without a length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):  # noqa: D105
        return iter(self.rows)


def test_a_stream_of_examples(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path, slim_start=0.25, slim_end=0.5)
    trainer.train_dataset = Stream(trainer.train_dataset)
    trainer.train()
    history = [entry["ffn2_sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert [step for step, value in enumerate(history, 1) if value == 0.5][0] == 6
    assert [step for step, value in enumerate(history, 1) if value > 0][0] == 3


class Overflowing(Trainer):
    """fp16 with loss scaling; the loss of a batch that begins with the token 3 is infinite."""

    def compute_loss(self, model, inputs, **kwargs):
        factor = math.inf if inputs["input_ids"][0, 0] == 3 else 1.0
        return super().compute_loss(model, inputs, **kwargs) * factor


def train_scaled(folder, bad, autocast=True, **settings):
    """12 steps, and one more with an infinite loss if `bad` names it; the scores, masks and weights after each."""
    model = build("bert", spread=0.1, **NO_DROPOUT)
    rows = make_data(model, rows=48)
    if bad:
        poison = make_data(model, rows=4, seed=99)
        poison[0]["input_ids"][0] = 3
        rows[4 * (bad - 1) : 4 * (bad - 1)] = poison
    settings = {
        "fp16": True,
        "use_cpu": True,
        "max_steps": len(rows) // 4,
        "lr_scheduler_type": "constant",
        **settings,
    }
    trainer = make_trainer(model, folder, trainer_class=Overflowing, weight_decay=0.1, **settings)
    trainer.train_dataset = Stream(rows)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # what accelerate does on a GPU
    trainer.accelerator.native_amp = True
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    steps = [({}, {}, weights(model))]

    def keep(step, model):
        slimming = slim_callback(trainer).slimming
        steps.append(
            (dict(slimming.scores.smoothed), {n: m.clone() for n, m in slimming.masks.items()}, weights(model))
        )

    trainer.add_callback(Record(keep))
    watcher = watch(trainer)
    trainer.train()
    assert (watcher.moved, watcher.returned) == (0, 0)
    assert trainer.accelerator.scaler.get_scale() == (512.0 if bad else 1024.0)
    return trainer, steps


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("bad", [1, 5, 7])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_skipped_for_overflow_counts_for_nothing(bad, optim, max_grad_norm, tmp_path):
    """The same as a run without that batch whose pruning steps are one earlier; 7 is one of them itself."""
    settings = {"slim_frequency": 2, "optim": optim, "max_grad_norm": max_grad_norm, "autocast": False}
    _, plain = train_scaled(tmp_path, None, slim_start=6, slim_end=10, **settings)
    trainer, skipping = train_scaled(tmp_path, bad, slim_start=7, slim_end=11, **settings)
    for step, (scores, masks, tensors) in enumerate(skipping[1:], 1):
        if (bad, step) == (7, 6):
            continue  # the other run has pruned here, this one has yet to skip a step
        expected = plain[step if step < bad else step - 1]
        assert equal(scores, expected[0])
        assert equal(tensors, expected[2])
        assert step < 7 or equal(masks, expected[1])
    assert bad == 7 or equal(skipping[bad][2], skipping[bad - 1][2])
    assert slim_callback(trainer).sparsities() == TARGET


def test_pruning_waits_for_the_first_step_that_is_taken(tmp_path):
    trainer, steps = train_scaled(tmp_path, 1, slim_start=1, slim_end=1, slim_schedule="oneshot")
    dropped = [sum(int((~mask).sum()) for mask in masks.values()) for _, masks, _ in steps[1:]]
    assert dropped == [0, *[68] * 12]
    assert slim_callback(trainer).sparsities() == TARGET


class Small(Trainer):
    """A device too small for batches of more than 4, which shows at some step."""

    fails_from = 0

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["labels"]) > 4 and self.state.global_step >= self.fails_from:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("fails_from", [0, 5])
def test_finding_the_batch_size_starts_over(fails_from, tmp_path):
    settings = {"per_device_train_batch_size": 5, "auto_find_batch_size": True, "slim_scope": "local"}
    trainer = make_trainer(build("bert", spread=0.05), tmp_path, trainer_class=Small, **settings)
    trainer.fails_from = fails_from
    watcher, begun = watch(trainer), []

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append((slim_callback(trainer).slimming, slim_callback(trainer).sparsities()["ffn2_sparsity"]))

    trainer.add_callback(Begin())
    trainer.train()
    assert trainer.state.train_batch_size in (2, 4)
    (first, nothing), (second, dropped) = begun
    assert second is slim_callback(trainer).slimming is not first
    assert nothing == 0 and (dropped == 0 if fails_from == 0 else 0 < dropped < 0.5)
    assert (watcher.steps, watcher.moved, watcher.returned) == (12 + fails_from, 0, 0)
    assert kept(trainer) == {s.name: s.units // 2 for s in find_structures(trainer.model).structures}


def test_model_init_and_a_second_training_start_afresh(tmp_path):
    args = SlimTrainingArguments(
        tmp_path, max_steps=12, save_strategy="no", report_to="none", disable_tqdm=True, **HALF
    )
    data = make_data(build("bert"))
    trainer = Trainer(
        model_init=lambda: build("bert"), args=args, train_dataset=data, callbacks=[SlimTrainerCallback()]
    )
    trainer.train()
    first, masks = trainer.model, kept(trainer)
    trainer.train()
    assert trainer.model is not first
    assert kept(trainer) == masks
    assert slim_callback(trainer).sparsities() == TARGET


def test_a_second_training_keeps_what_is_dropped(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path)
    trainer.train()
    before = {name: mask.clone() for name, mask in slim_callback(trainer).masks.items()}
    trainer.args.ffn2_sparsity = 0.75
    watcher = watch(trainer)
    trainer.train()
    after = slim_callback(trainer).masks
    assert not any((after[name] & ~before[name]).any() for name in before)
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.75, "mha_sparsity": 0.5}
    trainer.train()
    assert all(torch.equal(mask, after[name]) for name, mask in slim_callback(trainer).masks.items())
    assert watcher.moved == 0


def test_a_search_over_sparsities(tmp_path):
    optuna = pytest.importorskip("optuna")
    grid = [0.25, 0.5, 0.75]
    args = SlimTrainingArguments(
        tmp_path,
        max_steps=10,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{**HALF, "ffn2_sparsity": 0, "slim_scope": "local"},
    )
    data = make_data(build("bert"))
    callback, trials = SlimTrainerCallback(), []
    reached = Record(lambda step, model: trials.append((step, callback.slimming, callback.sparsities())))
    trainer = Trainer(
        model_init=lambda: build("bert"),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback, reached],
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"ffn2_sparsity": trial.suggest_categorical("ffn2_sparsity", grid)},
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"ffn2_sparsity": grid}, seed=0),
    )
    assert best.hyperparameters["ffn2_sparsity"] in grid
    assert [sparsities for step, _, sparsities in trials if step == 1] == [{"ffn2_sparsity": 0, "mha_sparsity": 0}] * 3
    ends = [sparsities for step, _, sparsities in trials if step == 10]
    assert sorted(end["ffn2_sparsity"] for end in ends) == grid
    assert [end["mha_sparsity"] for end in ends] == [0.5] * 3
    assert len({id(slimming) for _, slimming, _ in trials}) == 3


def make_worsening(folder, strategy, *, stop_first=True, **settings):
    """A trainer that evaluates every second step, each time with a lower metric; the target is reached at step 8."""
    saving = {"save_steps": 2} if strategy == "steps" else {}
    settings = {
        "max_steps": 20,
        "per_device_train_batch_size": 16,  # two steps are an epoch
        "eval_strategy": "epoch" if strategy == "epoch" else "steps",
        "eval_steps": 2,
        "save_strategy": strategy,
        "load_best_model_at_end": True,
        "metric_for_best_model": "worse",
        "greater_is_better": True,
        **saving,
        **settings,
    }
    trainer = make_trainer(build("bert"), folder, **settings)
    evaluations = iter(range(99, 0, -1))
    trainer.compute_metrics = lambda evaluated: {"worse": next(evaluations)}
    trainer.add_callback(EarlyStoppingCallback(1))
    if stop_first:
        slim = trainer.pop_callback(SlimTrainerCallback)
        trainer.add_callback(slim)
    return trainer


def check_stopped(trainer, folder):
    """Training stopped one evaluation after the target, with the weights of the first checkpoint there."""
    assert trainer.state.global_step == 10
    assert trainer.state.best_global_step == 8
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-8")
    saved = load_file(folder / "checkpoint-8" / "model.safetensors")
    assert equal(saved, {name: tensor for name, tensor in trainer.model.state_dict().items() if name in saved})
    zero = find_zero_units(trainer.model, find_structures(trainer.model).structures, whole=True)
    assert sum(int((~mask).sum()) for mask in zero.values()) == 64 + 4


@pytest.mark.parametrize("stop_first", [True, False])
@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_the_best_model_and_early_stopping_begin_at_the_target(strategy, stop_first, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_slim.training.callback.logger.info", messages.append)
    trainer = make_worsening(tmp_path, strategy, stop_first=stop_first, eval_on_start=True)
    trainer.train()
    check_stopped(trainer, tmp_path)
    assert messages == [
        "The best model is sought from step 8 on, at the final sparsity.",
        "The final sparsity is reached at step 8; the best model is sought from here on.",
    ]
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_worse" in entry]
    assert evaluated == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [4, 6, 8])
def test_the_best_model_of_a_resumed_run_begins_at_the_target(step, restore, tmp_path):
    make_worsening(tmp_path, "steps").train()
    state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == step
    resumed = make_worsening(tmp_path, "steps", restore_callback_states_from_checkpoint=restore)
    resumed.compute_metrics = lambda evaluated: {"worse": -resumed.state.global_step}
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    check_stopped(resumed, tmp_path)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_the_last_weights_stay_without_an_evaluation_at_the_target(tmp_path):
    settings = {"max_steps": 20, "eval_steps": 7, "save_steps": 7, "load_best_model_at_end": True}
    trainer = make_trainer(build("bert"), tmp_path, eval_strategy="steps", save_strategy="steps", **settings)
    last = {}
    trainer.add_callback(Record(lambda step, model: last.update(weights(model))))
    trainer.add_callback(StopAt(10))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [7]
    assert trainer.state.global_step == 10 and trainer.state.best_model_checkpoint is None
    assert equal(last, weights(trainer.model))
    assert slim_callback(trainer).sparsities() == TARGET


def test_an_early_end_is_said(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_slim.training.callback.logger.warning", messages.append)
    monkeypatch.setattr("hf_slim.saving.save.logger.warning", messages.append)
    settings = {"slim_schedule": "linear", "slim_frequency": 2, "slim_scope": "local"}
    trainer = make_trainer(build("bert"), tmp_path, callbacks=[StopAt(5)], **settings)
    trainer.train()
    reached = "{'ffn2_sparsity': 0.25, 'mha_sparsity': 0.25}"
    assert messages == [
        f"Training ended at step 5, before the last pruning step, 8: the sparsities reached are {reached}."
    ]
    report = save_slimmed(trainer, tmp_path / "slim")
    assert messages[1:] == [
        f"save_slimmed: training ended before the last pruning step, 8. The sparsities reached are {reached}, and the "
        "model is saved with those."
    ]
    assert [s.after for s in report.structures] == [3, 48, 3, 48]


class BadLoss(Trainer):
    """A loss that is not finite in step 4; with two batches a step, in the second of them."""

    value = math.nan

    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        self.batches = getattr(self, "batches", 0) + 1
        return loss * self.value if self.batches == 4 * self.args.gradient_accumulation_steps else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", ["taylor", "snip_momentum"])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}], ids=list)
def test_a_loss_that_is_not_finite_spoils_nothing(value, criterion, settings, tmp_path):
    trainer = make_trainer(
        build("bert"), tmp_path, trainer_class=BadLoss, slim_criterion=criterion, optim="sgd", **settings
    )
    trainer.value = value
    last = {}
    trainer.add_callback(Record(lambda step, model: last.update(weights(model))))
    with pytest.raises(RuntimeError, match="not finite at step 4, in all 4 structures"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert equal(last, weights(trainer.model))
    assert all(torch.isfinite(tensor).all() for tensor in last.values())
    scores = slim_callback(trainer).slimming.scores.smoothed
    assert len(scores) == 4 and all(torch.isfinite(values).all() for values in scores.values())


class BadGradient(TrainerCallback):
    """Writes NaN into one gradient at one step."""

    def __init__(self, model, step):
        self.model, self.step = model, step
        model.bert.encoder.layer[1].output.dense.weight.register_hook(self.spoil)
        self.now = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1

    def spoil(self, gradient):
        return gradient * math.nan if self.now == self.step else gradient


def test_a_gradient_that_is_not_finite_spoils_nothing(tmp_path):
    model = build("bert")
    trainer = make_trainer(model, tmp_path, max_grad_norm=0.0)
    trainer.add_callback(BadGradient(model, 4))
    with pytest.raises(RuntimeError, match="not finite at step 4, in all 4 structures"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_nan_weights_are_named_by_magnitude(tmp_path):
    model = build("bert")
    trainer = make_trainer(model, tmp_path, slim_criterion="magnitude")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="not finite at step 2, in all 2 structures"):
        trainer.train()
