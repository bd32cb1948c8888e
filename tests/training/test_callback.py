"""Slimming while a Trainer trains: schedule, logs, optimizers, precision, resuming, bad settings."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import build
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import HALF, Mine, kept, make_data, make_trainer, slim_callback, watch, weights
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_slim import (
    SlimConfig,
    SlimSeq2SeqTrainingArguments,
    SlimTrainerCallback,
    SlimTrainingArguments,
    find_structures,
    parse_auto_slim_config,
)
from hf_slim.compaction.zeros import find_zero_units

TARGET = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_every_family_trains_to_the_target(family, tmp_path):
    trainer = make_trainer(build(family, spread=0.05), tmp_path, slim_scope="local")
    watcher = watch(trainer)
    trainer.train()
    structures = find_structures(trainer.model).structures
    assert kept(trainer) == {s.name: s.units // 2 for s in structures}
    assert (watcher.steps, watcher.moved, watcher.returned) == (12, 0, 0)


@pytest.mark.parametrize(
    ("criterion", "scope", "schedule"),
    [
        ("magnitude", "global", "exp"),
        ("snip_momentum", "local", "exp"),
        ("magnitude", "local", "cubic"),
        ("taylor", "global", "cubic"),
        ("snip_momentum", "global", "cos"),
        ("taylor", "local", "cos"),
        ("taylor", "global", "linear"),
        ("magnitude", "local", "linear"),
        ("snip_momentum", "local", "oneshot"),
        ("taylor", "global", "oneshot"),
    ],
)
def test_all_settings_reach_the_target(criterion, scope, schedule, tmp_path):
    settings = {"slim_criterion": criterion, "slim_scope": scope, "slim_schedule": schedule, "slim_round_to": 1}
    trainer = make_trainer(build("bert"), tmp_path, **settings)
    trainer.train()
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_sparsities_are_logged_everywhere(tmp_path, capsys):
    settings = {"slim_schedule": "linear", "slim_frequency": 2, "slim_round_to": 1, "slim_scope": "local"}
    trainer = make_trainer(build("bert"), tmp_path, report_to="tensorboard", **settings)
    assert any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    expected = [0, 0.125, 0.125, 0.25, 0.25, 0.375, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["ffn2_sparsity"] for entry in history] == expected
    assert [entry["mha_sparsity"] for entry in history] == [0, 0, 0, 0.25, 0.25, 0.25, 0.25, *[0.5] * 5]
    assert capsys.readouterr().out.count("'ffn2_sparsity': '0.5'") == 5
    (events,) = tmp_path.rglob("events.out.tfevents*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [event.value for event in board.Scalars("train/ffn2_sparsity")] == expected


def test_only_one_kind(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path, mha_sparsity=0.0)
    trainer.train()
    assert [name.endswith("attention.output.dense") for name in slim_callback(trainer).masks] == [False, False]
    assert trainer.state.log_history[-2]["mha_sparsity"] == 0.0


def test_excluded_modules_stay(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path, slim_exclude=["layer.0"], slim_scope="local")
    trainer.train()
    model = trainer.model
    assert sorted(slim_callback(trainer).masks) == [
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.output.dense",
    ]
    found = find_structures(model).structures
    assert [int((~mask).sum()) for mask in find_zero_units(model, found).values()] == [0, 0, 2, 32]


def test_a_slim_config_beside_plain_arguments(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path, config=SlimConfig(**HALF))
    trainer.train()
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_epochs_instead_of_steps(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path, max_steps=-1, num_train_epochs=2, slim_end=0.5)
    trainer.train()
    history = [entry["ffn2_sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 16
    assert [step for step, value in enumerate(history, 1) if value == 0.5][0] == 8


@pytest.mark.parametrize("criterion", ["taylor", "snip_momentum", "magnitude"])
@pytest.mark.parametrize("restore", [False, True])
def test_resuming_gives_the_same_weights(criterion, restore, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 5,
        "slim_criterion": criterion,
        "restore_callback_states_from_checkpoint": restore,
        "use_cpu": True,
    }
    whole = make_trainer(build("bert"), tmp_path, **settings)
    whole.train()
    resumed = make_trainer(build("bert", seed=5), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = weights(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    assert kept(resumed) == kept(whole)


def test_both_sparsities_zero_warn(tmp_path):
    trainer = make_trainer(build("bert"), tmp_path, ffn2_sparsity=0.0, mha_sparsity=0.0)
    with pytest.warns(UserWarning, match="ffn2_sparsity and mha_sparsity are both 0"):
        trainer.train()


def frozen_bert():
    model = build("bert")
    model.bert.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (build, {"slim_exclude": ["layer.9"]}, "the pattern 'layer.9' matches no module"),
        (build, {"slim_exclude": ["intermediate"]}, "slim_exclude=.'intermediate'. leaves no ffn structure"),
        (build, {"slim_round_to": 64, "slim_scope": "local"}, "ffn2_sparsity=0.5 is unreachable"),
        (build, {"slim_min_heads": 3}, "mha_sparsity=0.5 is unreachable: .* so 0.25 is the most"),
        (lambda name: frozen_bert(), {}, "output.dense.weight is frozen, so slim_criterion='taylor' cannot score"),
    ],
)
def test_bad_settings_are_refused_before_training(make, settings, message, tmp_path):
    model = make("bert")
    trainer = make_trainer(model, tmp_path, **settings)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nothing_to_slim_is_refused_before_training(tmp_path):
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.DiffLlamaConfig(vocab_size=99, intermediate_size=64, **fields)
    trainer = make_trainer(transformers.DiffLlamaForCausalLM(config), tmp_path)
    with pytest.raises(ValueError, match=r"no attention module that can be slimmed. Skipped:\n.*lambda_q1"):
        trainer.train()


def test_arguments_without_fields_are_refused(tmp_path):
    model = build("bert")
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none")
    trainer = Trainer(model, args, train_dataset=make_data(model), callbacks=[SlimTrainerCallback()])
    with pytest.raises(ValueError, match="TrainingArguments has no field 'ffn2_sparsity'"):
        trainer.train()


class OwnTrainer(Trainer):
    """A trainer with a `train` of its own."""

    def train(self):
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        return SimpleNamespace(global_step=self.args.max_steps)


@pytest.mark.parametrize("trainer_class", [Trainer, transformers.Seq2SeqTrainer, OwnTrainer])
def test_arguments_with_a_sparsity_and_no_callback_are_refused(trainer_class, tmp_path):
    model = build("bert")
    before = weights(model)
    settings = {"max_steps": 2, "report_to": "none", "predict_with_generate": False, "mha_sparsity": 0.5}
    args = SlimSeq2SeqTrainingArguments(tmp_path, **settings)
    trainer = trainer_class(model, args, train_dataset=make_data(model))
    with pytest.raises(
        ValueError,
        match=r"^SlimSeq2SeqTrainingArguments has mha_sparsity=0\.5, but the trainer has no SlimTrainerCallback, so "
        r"nothing would be removed: pass callbacks=\[SlimTrainerCallback\(\)\] to the trainer, or",
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    args.mha_sparsity = 0.0
    assert trainer.train().global_step == 2


def test_a_searched_sparsity_without_a_callback_is_refused(tmp_path):
    """The arguments ask for nothing; a trial does."""
    args = SlimTrainingArguments(tmp_path, max_steps=2, report_to="none", eval_strategy="steps", eval_steps=2)
    data = make_data(build("bert"))
    trainer = Trainer(model_init=lambda: build("bert"), args=args, train_dataset=data, eval_dataset=data)
    with pytest.raises(ValueError, match=r"SlimTrainingArguments has ffn2_sparsity=0\.5, but the trainer has no Slim"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"ffn2_sparsity": trial.suggest_categorical("ffn2_sparsity", [0.5])},
            backend="optuna",
            n_trials=1,
        )


def train_with(config, folder, **settings):
    model = build("bert")
    args = SlimTrainingArguments(
        folder, **{"max_steps": 12, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **settings}
    )
    trainer = Trainer(model, args, train_dataset=make_data(model), callbacks=[SlimTrainerCallback(config)])
    trainer.train()
    return trainer


def test_settings_that_are_given_twice_and_differ_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^Settings are given twice: SlimTrainingArguments has ffn2_sparsity=0\.25, slim_end=6, the SlimConfig "
        r"of SlimTrainerCallback has ffn2_sparsity=0\.5, slim_end=8\. Give them once",
    ):
        train_with(SlimConfig(**HALF), tmp_path, ffn2_sparsity=0.25, slim_start=2, slim_end=6)
    assert not tmp_path.joinpath("runs").exists()  # refused with the trainer, before it trains


def test_settings_of_the_arguments_beside_entries_are_refused(tmp_path):
    entries = parse_auto_slim_config(build("bert"), 0.5, 0.5, start_step=2, end_step=8)
    with pytest.raises(
        ValueError,
        match=r"was given auto-slim entries, which hold all settings, and SlimTrainingArguments has "
        r"mha_sparsity=0\.5, slim_live=False: give one of the two",
    ):
        train_with(entries, tmp_path, mha_sparsity=0.5, slim_live=False)
    assert slim_callback(train_with(entries, tmp_path)).sparsities() == TARGET


@pytest.mark.parametrize("settings", [{}, HALF, {"ffn2_sparsity": 0.5}])
def test_settings_that_are_given_once_or_are_equal(settings, tmp_path):
    """Fields that the arguments leave at their defaults are those of the SlimConfig."""
    assert slim_callback(train_with(SlimConfig(**HALF), tmp_path, **settings)).sparsities() == TARGET


def test_arguments_that_change_after_the_trainer_was_built(tmp_path):
    trainer = train_with(SlimConfig(**HALF), tmp_path)
    trainer.args.ffn2_sparsity = 0.25
    with pytest.raises(ValueError, match=r"has ffn2_sparsity=0\.25, the SlimConfig of SlimTrainerCallback has ffn2_"):
        trainer.train()


@pytest.mark.parametrize("others", [(Mine, Mine), (Mine, SlimTrainerCallback), (SlimTrainerCallback, Mine)])
def test_two_callbacks_of_any_class_are_refused(others, tmp_path):
    one, other = (cls() for cls in others)
    model = build("bert")
    args = SlimTrainingArguments(tmp_path, max_steps=12, report_to="none", **HALF)
    with pytest.raises(ValueError, match="more than one SlimTrainerCallback, and each would drop units of the same"):
        Trainer(model, args, train_dataset=make_data(model), callbacks=[one, other])
    trainer = Trainer(model, args, train_dataset=make_data(model), callbacks=[one])
    trainer.add_callback(other)
    with pytest.raises(ValueError, match="more than one SlimTrainerCallback"):
        trainer.train()
