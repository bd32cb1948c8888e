"""Everything the Trainer does: optimizers, scaling, accumulation, compilation, searches, best models, early stops."""

import math

import pytest
import torch
from conftest import build
from test_callback import HALF, make_data, make_trainer, slim_callback, watch
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_slim import SlimTrainerCallback, SlimTrainingArguments, find_structures, save_slimmed
from hf_slim.masking import find_zero_units

TARGET = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EVERY = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
LAYERS = {"optim_target_modules": ["attention", "intermediate", "output"], "optim_args": "rank=4,scale=1.0"}
WITHOUT_GRADIENTS = ("lomo", "adalomo", "layerwise")


class EvaluationWatch(TrainerCallback):
    """Counts the dropped units that are not zero when the model is evaluated."""

    moved = 0

    def on_evaluate(self, args, state, control, model, **kwargs):
        masks = self.slim.masks
        structures = [s for s in find_structures(model).structures if s.name in masks]
        whole = find_zero_units(model, structures, whole=True)
        self.moved += sum(int((whole[s.name] & ~masks[s.name]).sum()) for s in structures)


def optimizer_settings(name):
    settings = {"optim": name, "weight_decay": 0.1}
    if name.startswith(("galore", "apollo")):
        settings |= LAYERS
    if any(word in name for word in WITHOUT_GRADIENTS):
        settings |= {"slim_criterion": "magnitude", "max_grad_norm": 0.0}
    return settings


def skip_if_it_cannot_train(folder, name):
    """The real reason why an optimizer is not to be had here, from one step without slimming."""
    try:
        trainer = make_trainer(
            build("bert"), folder, use_cpu=True, **{**optimizer_settings(name), "max_steps": 8, "slim_end": 8}
        )
        trainer.remove_callback(SlimTrainerCallback)
        trainer.train()
    except (ImportError, ValueError, RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
        pytest.skip(f"{name}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_dropped_units_are_zero_with_every_optimizer(name, tmp_path):
    skip_if_it_cannot_train(tmp_path / "tried", name)
    trainer = make_trainer(build("bert", spread=0.05), tmp_path, use_cpu=True, **EVERY, **optimizer_settings(name))
    steps, evaluations = watch(trainer), EvaluationWatch()
    evaluations.slim = slim_callback(trainer)
    trainer.add_callback(evaluations)
    trainer.train()
    assert (steps.steps, steps.moved, steps.returned, evaluations.moved) == (12, 0, 0, 0)
    assert slim_callback(trainer).sparsities() == TARGET
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-12")
    zero = find_zero_units(saved, find_structures(saved).structures, whole=True)
    assert sum(int((~mask).sum()) for mask in zero.values()) == 64 + 4


@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
def test_weights_that_an_optimizer_swaps_in_are_zero_as_well(activation, tmp_path):
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model = build("bert", spread=0.05, hidden_act=activation)
    trainer = make_trainer(model, tmp_path, use_cpu=True, optim="schedule_free_adamw", lr_scheduler_type="constant")
    trainer.train()
    structures = find_structures(model).structures
    for mode in ("eval", "train"):
        getattr(trainer.optimizer, mode)()
        zero = find_zero_units(model, structures, whole=True)
        assert sum(int((~mask).sum()) for mask in zero.values()) == 64 + 4


def test_without_gradients_a_gradient_criterion_is_refused(tmp_path):
    model = build("bert")
    trainer = make_trainer(model, tmp_path)

    def forget(args, state, control, **kwargs):
        model.zero_grad()

    trainer.callback_handler.callbacks.insert(0, type("Forget", (TrainerCallback,), {})())
    trainer.callback_handler.callbacks[0].on_pre_optimizer_step = forget
    with pytest.raises(
        RuntimeError, match="no gradient in any of the 4 structures .*LOMO.*slim_criterion='magnitude'"
    ):
        trainer.train()


def test_accumulated_gradients_give_the_masks_of_the_large_batch(tmp_path):
    masks = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            build("bert", spread=0.05, **NO_DROPOUT),
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            average_tokens_across_devices=False,
        )
        trainer.model_accepts_loss_kwargs = False  # else transformers adds the means of the small batches up
        trainer.train()
        masks.append(slim_callback(trainer).masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


class Spoil(TrainerCallback):
    """Makes one gradient infinite at one step."""

    def __init__(self, model, step):
        self.step, self.now = step, 0
        model.bert.encoder.layer[1].output.dense.weight.register_hook(self.spoil)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1

    def spoil(self, gradient):
        return gradient * math.inf if self.now == self.step else gradient


class ScoreLog(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = {n: s.clone() for n, s in self.slim.slimming._scores.items()}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_loss_scaling_skips_does_not_advance_scores(optimizer, tmp_path):
    model = build("bert", spread=0.05)
    trainer = make_trainer(model, tmp_path, use_cpu=True, optim=optimizer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.native_amp = True
    log = ScoreLog()
    log.seen, log.slim = {}, slim_callback(trainer)
    trainer.add_callback(log)
    trainer.add_callback(Spoil(model, 4))
    trainer.train()
    assert trainer.optimizer.scaler is trainer.accelerator.scaler
    assert trainer.accelerator.scaler.get_scale() == 512.0
    assert all(torch.equal(scores, log.seen[3][name]) for name, scores in log.seen[4].items())
    assert not any(torch.equal(scores, log.seen[4][name]) for name, scores in log.seen[5].items())
    assert slim_callback(trainer).sparsities() == TARGET


def test_an_infinite_loss_is_named_before_it_spoils_anything(tmp_path):
    model = build("bert")
    trainer = make_trainer(model, tmp_path)
    trainer.add_callback(Spoil(model, 4))
    with pytest.raises(RuntimeError, match="not finite at step 4"):
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert all(torch.isfinite(scores).all() for scores in slim_callback(trainer).slimming._scores.values())


@pytest.mark.parametrize(
    "settings",
    [{"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"bf16": True}, {"eval_on_start": True, **EVERY}],
    ids=["compile", "bf16", "eval_on_start"],
)
def test_other_ways_to_train(settings, tmp_path):
    trainer = make_trainer(build("bert", spread=0.05), tmp_path, use_cpu=True, **settings)
    watcher = watch(trainer)
    trainer.train()
    assert (watcher.steps, watcher.moved, watcher.returned) == (12, 0, 0)
    assert slim_callback(trainer).sparsities() == TARGET
    assert save_slimmed(trainer, tmp_path / "slim").parameters_after < 40000


@pytest.mark.parametrize("fails_at", [1, 6])
def test_a_smaller_batch_size_starts_over(fails_at, tmp_path):
    class Full(Trainer):
        sizes = []

        def training_step(self, model, inputs, *args, **kwargs):
            size = len(inputs["input_ids"])
            self.sizes.append(size)
            if size > 4 and self.state.global_step + 1 == fails_at:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    Full.sizes = []
    model = build("bert", spread=0.05)
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 5}
    trainer = make_trainer(model, tmp_path, trainer_class=Full, use_cpu=True, **settings)
    trainer.train()
    assert trainer.state.global_step == 12 and set(Full.sizes) == {5, 4}
    assert slim_callback(trainer).sparsities() == TARGET
    assert slim_callback(trainer).slimming.to_state()["steps"] == [list(range(2, 9))] * 2


def test_data_without_a_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_data(build("bert")))

    args = SlimTrainingArguments(tmp_path, max_steps=12, save_strategy="no", report_to="none", use_cpu=True, **HALF)
    trainer = Trainer(build("bert"), args, train_dataset=Stream(), callbacks=[SlimTrainerCallback()])
    trainer.train()
    assert slim_callback(trainer).sparsities() == TARGET


def test_a_search_over_sparsities_starts_each_trial_afresh(tmp_path):
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    args = SlimTrainingArguments(
        tmp_path, max_steps=12, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **HALF
    )
    data = make_data(build("bert"))
    callback = SlimTrainerCallback()
    trainer = Trainer(
        model_init=lambda: build("bert"), args=args, train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    reached = []
    trainer.compute_metrics = lambda evaluated: {"sparsity": reached.append(callback.sparsities()) or 0.0}
    trainer.hyperparameter_search(
        lambda trial: {"ffn2_sparsity": trial.suggest_categorical("ffn2_sparsity", [0.25, 0.75])},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"ffn2_sparsity": [0.25, 0.75]}, seed=0),
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert sorted(found["ffn2_sparsity"] for found in reached) == [0.25, 0.75]
    assert {found["mha_sparsity"] for found in reached} == {0.5}


def worse_and_worse(trainer):
    """An evaluation that gets worse each time."""
    values = iter(range(99, 0, -1))
    trainer.compute_metrics = lambda evaluated: {"worse": next(values)}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_early_stopping_waits_for_the_target(first, strategy, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_slim.callback.logger.info", messages.append)
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(
        build("bert"),
        tmp_path,
        callbacks=[] if first else [stopping],
        load_best_model_at_end=True,
        metric_for_best_model="worse",
        greater_is_better=True,
        **{**EVERY, "eval_steps": 2, "save_steps": 2, "save_strategy": strategy},
    )
    if first:
        trainer.callback_handler.callbacks.insert(0, stopping)
    worse_and_worse(trainer)
    trainer.train()
    assert trainer.state.global_step == 10  # the second evaluation at the final sparsity is worse than the first
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    assert any("The best model is sought from step 8 on" in message for message in messages)
    assert any("final sparsity is reached at step 8" in message for message in messages)


def test_a_resumed_run_does_not_take_an_early_best_model(tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "worse", "greater_is_better": True, **EVERY}
    first = make_trainer(build("bert"), tmp_path, **settings)
    worse_and_worse(first)
    first.train()
    resumed = make_trainer(build("bert"), tmp_path, **settings)
    worse_and_worse(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_saving_says_that_training_ended_early(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("hf_slim.saving.logger.warning", messages.append)
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", **EVERY}
    trainer = make_trainer(build("bert"), tmp_path, callbacks=[StopAt()], **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    save_slimmed(trainer, tmp_path / "slim")
    reached = slim_callback(trainer).sparsities()
    assert 0 < reached["ffn2_sparsity"] < 0.5
    assert messages == [
        "save_slimmed: training ended before the last pruning step, 8. The sparsities reached are "
        f"{reached}, and the model is saved with those."
    ]
