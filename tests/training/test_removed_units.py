"""Live compaction: the same training as with masks, on a model that shrinks under way."""

import json

import pytest
import torch
from conftest import build
from safetensors.torch import load_file
from tiny import build_tiny
from trainers import (
    EVERY,
    NO_DROPOUT,
    Trajectory,
    dropout_free,
    make_data,
    make_trainer,
    shapes,
    slim_callback,
    weights,
)
from transformers import Trainer, TrainerCallback
from transformers.training_args import ParallelMode

from hf_slim import (
    SlimConfig,
    SlimTrainerCallback,
    find_structures,
    model_slim,
    parse_auto_slim_config,
    save_slimmed,
)
from hf_slim.compaction.zeros import zero_units


def run(family, folder, *, live, spread=0.1, changes=None, **settings):
    model = build(family, spread=spread, **NO_DROPOUT.get(family, {}), **(changes or {}))
    trainer = make_trainer(model, folder, slim_live=live, **settings)
    trajectory = Trajectory()
    trajectory.watched = slim_callback(trainer)
    trainer.add_callback(trajectory)
    trainer.train()
    return trainer, trajectory


def compare(one, other, tolerance=1e-4):
    assert len(one.losses) == len(other.losses) > 0
    for step, (masks, others) in enumerate(zip(one.masks, other.masks, strict=True)):
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items()), step
    for pair, other_pair in zip(one.losses, other.losses, strict=True):
        assert pair == pytest.approx(other_pair, rel=tolerance)


def test_live_is_the_same_training(family, tmp_path):
    settings = {"max_grad_norm": 0.5, "weight_decay": 0.1, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    masked, trajectory = run(family, tmp_path / "masked", live=False, **settings)
    live, shrinking = run(family, tmp_path / "live", live=True, **settings)
    compare(trajectory, shrinking)
    assert len(set(trajectory.sizes)) == 1
    assert shrinking.sizes[0] == trajectory.sizes[0] and shrinking.sizes[-1] < shrinking.sizes[0]
    assert sorted(shrinking.sizes, reverse=True) == shrinking.sizes
    for structure in find_structures(live.model).structures:
        assert structure.units == int(slim_callback(live).masks[structure.name].sum())


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
@pytest.mark.parametrize("step", [1, 3, 6, 9])
def test_resuming_takes_the_shape_of_the_checkpoint(step, criterion, tmp_path):
    settings = {**EVERY, "save_steps": step, "slim_criterion": criterion, "slim_live": True, "use_cpu": True}
    whole = make_trainer(dropout_free(), tmp_path, **settings)
    whole.train()
    resumed = make_trainer(dropout_free(seed=5), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert shapes(resumed.model) == shapes(whole.model)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    report, again = save_slimmed(whole, tmp_path / "one"), save_slimmed(resumed, tmp_path / "two")
    assert report == again and report.parameters_after < report.parameters_before


def test_resuming_one_kind_from_before_the_first_pruning_step(tmp_path):
    settings = {**EVERY, "save_steps": 1, "mha_sparsity": 0.0, "slim_live": True, "use_cpu": True}
    whole = make_trainer(dropout_free(), tmp_path, **settings)
    whole.train()
    resumed = make_trainer(dropout_free(seed=5), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected = weights(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed.model).items())


def test_resuming_in_the_same_trainer_brings_units_back(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True, use_cpu=True, **EVERY)
    trainer.train()
    first = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(trainer.model).items())


def test_resuming_with_model_init(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True, use_cpu=True, **EVERY)
    trainer.train()
    data = make_data(dropout_free())
    resumed = Trainer(
        model_init=lambda: dropout_free(seed=7),
        args=trainer.args,
        train_dataset=data,
        callbacks=[SlimTrainerCallback()],
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert shapes(resumed.model) == shapes(trainer.model)
    assert slim_callback(resumed).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_checkpoints_load_as_slim_models(family, tmp_path):
    model = build(family, spread=0.1)
    trainer = make_trainer(model, tmp_path, slim_live=True, save_strategy="steps", save_steps=6)
    trainer.train()
    for step in (6, 12):
        loaded = type(model).from_pretrained(tmp_path / f"checkpoint-{step}")
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        dropped = state["stateful_callbacks"]["SlimTrainerCallback"]["attributes"]["saved"]["dropped"]
        whole = {name: len(mask) for name, mask in slim_callback(trainer).masks.items()}
        found = {s.name: s.units for s in find_structures(loaded).structures}
        assert found == {name: whole[name] - len(units) for name, units in dropped.items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True, save_steps=1, **best)
    trainer.train()
    assert trainer.state.best_global_step >= 8
    folder = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    expected = load_file(folder / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_compilation(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "slim_frequency": 1, "max_steps": 14}
    settings |= {"slim_start": 2, "slim_end": 12, "slim_round_to": 1, "changes": {"num_hidden_layers": 1}}
    masked, trajectory = run("bert", tmp_path / "masked", live=False, **{**settings, "torch_compile": False})
    live, shrinking = run("bert", tmp_path / "live", live=True, **settings)
    compare(trajectory, shrinking)


@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "schedule_free_adamw"]
)
def test_optimizers(optim, tmp_path):
    trainer = make_trainer(
        dropout_free(),
        tmp_path,
        slim_live=True,
        optim=optim,
        **{"optim_args": "momentum=0.9" if optim == "rmsprop" else None},
    )
    trainer.train()
    assert slim_callback(trainer).slimming.is_live
    for parameter, state in trainer.optimizer.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == parameter.dim() and value.dim():
                assert value.shape == parameter.shape, key


def test_training_again_goes_on_from_what_is_left(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True)
    trainer.train()
    before = shapes(trainer.model)
    trainer.train()
    assert shapes(trainer.model) == before
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def messages_of(monkeypatch):
    messages = []
    for module in ("removed_units", "undecided_units"):
        monkeypatch.setattr(f"hf_slim.training.{module}.logger.info", messages.append)
    return messages


def test_a_state_that_cannot_be_sliced_is_named(tmp_path, monkeypatch):
    """The projection of GaLore mixes positions."""
    pytest.importorskip("galore_torch")
    settings = {"optim": "galore_adamw", "optim_args": "rank=4", "optim_target_modules": "all-linear"}
    before = shapes(dropout_free())
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True, **settings)
    with pytest.raises(
        RuntimeError, match="slim_live=True cannot be used here: AdamW keeps the state '.*' .* for bert"
    ):
        trainer.train()
    assert shapes(trainer.model) == before
    messages = messages_of(monkeypatch)
    trainer = make_trainer(dropout_free(), tmp_path, slim_live="auto", **settings)
    trainer.train()
    assert shapes(trainer.model) == before
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    assert [
        m.startswith("Dropped units stay in the model as zeros until it is saved: AdamW keeps") for m in messages
    ] == [True]


def test_a_norm_over_all_units_is_refused(tmp_path):
    """Without some of the units its weight is rescaled, which AdamW would not follow."""
    model = build_tiny("olmo2", "AutoModelForCausalLM")
    with pytest.raises(ValueError, match="slim_live=True cannot be used here: .*q_norm.weight normalizes over all"):
        make_trainer(model, tmp_path, slim_live=True).train()
    before = shapes(model)
    trainer = make_trainer(model, tmp_path, slim_live="auto", slim_round_to=4)
    trainer.train()
    assert shapes(model) == before and not slim_callback(trainer).slimming.is_live


def test_two_devices_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True)
    monkeypatch.setattr(type(trainer.args), "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="slim_live=True cannot be used here: the training runs on several devices"):
        trainer.train()


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(dropout_free(), peft.LoraConfig(target_modules=["query", "value"]))
    trainer = make_trainer(model, tmp_path, slim_live=True, slim_criterion="magnitude")
    with pytest.raises(ValueError, match="slim_live=True cannot be used here: PeftModel has adapters"):
        trainer.train()


def test_entries_of_the_two_calls_leave_the_rounding_to_model_slim(tmp_path):
    model = dropout_free()
    entries = parse_auto_slim_config(model, 0.5, 0.5, start_step=2, end_step=8, pruning_frequency=2)
    before = shapes(model)
    trainer = make_trainer(model, tmp_path, config=entries)
    trainer.train()
    assert shapes(model) == before
    model_slim(model, round_multiplier=8)
    assert shapes(model) != before


def test_auto_is_live_on_one_device(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live="auto")
    trainer.train()
    assert slim_callback(trainer).slimming.is_live
    assert SlimConfig().slim_live == "auto"


class Graphs(TrainerCallback):
    """How many graphs have been compiled at the end of each step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("live", [True, False, None])
def test_nothing_is_compiled_again_between_pruning_steps(live, tmp_path):
    """Without any slimming something is compiled in steps 1 and 2."""
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 12, "slim_round_to": 1}
    settings |= {"slim_start": 3, "slim_end": 9, "slim_frequency": 3, "slim_schedule": "linear"}
    settings |= {"ffn2_sparsity": 0.0, "mha_sparsity": 0.0} if live is None else {}
    trainer = make_trainer(dropout_free(num_hidden_layers=1), tmp_path, slim_live=live or False, **settings)
    if live is None:
        trainer.remove_callback(SlimTrainerCallback)
    graphs = Graphs()
    trainer.add_callback(graphs)
    torch._dynamo.reset()
    trainer.train()
    compiled = [after - before for before, after in zip(graphs.counts, graphs.counts[1:], strict=False)]
    again = {step for step, number in enumerate(compiled, 2) if number}
    assert again == ({2, 4, 7, 10} if live else {2})


def test_tensors_are_contiguous_and_own_their_memory_alone(family, tmp_path):
    trainer = make_trainer(build(family, spread=0.1), tmp_path, slim_live=True)
    trainer.train()
    states = [value for state in trainer.optimizer.optimizer.state.values() for value in state.values()]
    for tensor in (*trainer.model.parameters(), *(state for state in states if torch.is_tensor(state))):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_models_built_from_the_config_of_a_live_one_are_whole(tmp_path):
    model = dropout_free()
    config = model.config
    trainer = make_trainer(model, tmp_path, slim_live=True)
    trainer.train()
    assert not hasattr(config, "hf_slim") and hasattr(model.config, "hf_slim")
    assert shapes(type(model)(config)) == shapes(dropout_free())
    assert {id(m.config) for m in model.modules() if "config" in m.__dict__} == {id(model.config)}


def test_model_init_begins_anew_each_time(tmp_path):
    config = dropout_free().config
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True)
    again = Trainer(
        model_init=lambda: type(trainer.model)(config),
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        callbacks=[SlimTrainerCallback()],
    )
    sizes = []
    for _ in range(2):
        again.train()
        sizes.append(again.model.num_parameters())
        assert save_slimmed(again, tmp_path / "slim").parameters_before == trainer.model.num_parameters()
    assert sizes[0] < trainer.model.num_parameters()
    assert slim_callback(again).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}


def test_stacked_experts_keep_their_multiple(tmp_path):
    model = build_tiny("mixtral", "AutoModelForCausalLM")
    trainer = make_trainer(model, tmp_path, slim_live=True, slim_round_to=1, mha_sparsity=0.0)
    trainer.train()
    for structure in find_structures(model).of_kind("ffn"):
        assert structure.multiple > 1 and structure.units % structure.multiple == 0


class OwnLoading(Trainer):
    """A trainer with its own way to load a checkpoint, as that of sentence-transformers."""

    def _load_from_checkpoint(self, checkpoint_path):
        self.model.load_state_dict(load_file(f"{checkpoint_path}/model.safetensors"))


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("changes", [{"trainer_class": OwnLoading}, {"restore_callback_states_from_checkpoint": True}])
def test_trainers_that_load_otherwise(step, changes, tmp_path):
    settings = {**EVERY, "slim_live": True, "use_cpu": True}
    whole = make_trainer(dropout_free(), tmp_path, **settings)
    whole.train()
    resumed = make_trainer(dropout_free(seed=5), tmp_path, **settings, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = weights(whole.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed.model).items())


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_going_back_to_before_the_first_pruning_step(optim, tmp_path):
    settings = {**EVERY, "slim_live": True, "save_steps": 1, "slim_start": 4, "optim": optim, "use_cpu": True}
    trainer = make_trainer(dropout_free(), tmp_path, **settings)
    trainer.train()
    first = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(trainer.model).items())
    whole = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3")
    assert shapes(whole) == shapes(dropout_free())


def test_a_refused_training_changes_nothing(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True)
    trainer.train()
    before = shapes(trainer.model)
    trainer.args.slim_end = 50
    with pytest.raises(ValueError, match="slim_end=50 is beyond the last training step"):
        trainer.train()
    trainer.args.slim_end = 8
    trainer.train()
    assert shapes(trainer.model) == before


def test_a_second_training_with_another_plan_is_resumed(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path / "one", slim_live=True, ffn2_sparsity=0.0)
    trainer.train()
    settings = {**EVERY, "slim_live": True, "mha_sparsity": 0.0, "use_cpu": True}
    second = make_trainer(trainer.model, tmp_path / "two", **settings)
    second.train()
    expected = weights(second.model)
    resumed = make_trainer(dropout_free(seed=5), tmp_path / "two", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-6"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed.model).items())


def test_a_live_checkpoint_needs_one_device(tmp_path, monkeypatch):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live="auto", **EVERY)
    trainer.train()
    resumed = make_trainer(dropout_free(), tmp_path, slim_live="auto", **EVERY)
    before = shapes(resumed.model)
    monkeypatch.setattr(type(trainer.args), "parallel_mode", ParallelMode.DISTRIBUTED)
    with pytest.raises(
        ValueError, match="checkpoint-6 is a checkpoint of a training with live compaction, but the tr"
    ):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert shapes(resumed.model) == before


def test_a_model_that_was_changed_in_between_counts_as_a_new_one(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, slim_live=True, ffn2_sparsity=0.0)
    trainer.train()
    structures = find_structures(trainer.model).of_kind("ffn")
    masks = {s.name: torch.arange(s.units) < 48 for s in structures}
    zero_units(trainer.model, structures, masks)
    save_slimmed(trainer, tmp_path / "slim", inplace=True)
    again = make_trainer(trainer.model, tmp_path, slim_live=True, ffn2_sparsity=0.5, mha_sparsity=0.0)
    again.train()
    report = save_slimmed(again, tmp_path / "again")
    sizes = [(s.before, s.after) for s in report.structures if s.kind == "ffn"]
    assert [before for before, _ in sizes] == [64, 64] and sum(after for _, after in sizes) == 48  # half of twice 48


class OutOfMemory(TrainerCallback):
    """Runs out of memory once, at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory.")


AGAIN = {**EVERY, "slim_live": True, "auto_find_batch_size": True, "save_steps": 2, "slim_start": 4, "use_cpu": True}


def test_a_smaller_batch_goes_on_with_what_is_left(tmp_path):
    trainer = make_trainer(dropout_free(), tmp_path, **AGAIN)
    trainer.add_callback(OutOfMemory(7))
    trainer.train()
    assert slim_callback(trainer).sparsities() == {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5}
    for parameter, state in trainer.optimizer.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_a_smaller_batch_after_resuming_does_not_mix_shapes(tmp_path):
    """The Trainer loads the checkpoint's optimizer again, and not its weights."""
    make_trainer(dropout_free(), tmp_path, **AGAIN).train()
    trainer = make_trainer(dropout_free(), tmp_path, **AGAIN)
    trainer.add_callback(OutOfMemory(7))
    with pytest.raises(ValueError, match="AdamW keeps the state 'exp_avg.* Build the model anew and start or"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
