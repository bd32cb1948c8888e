"""A `Slimmer` in loops of somebody's own gives what `SlimTrainerCallback` gives in a Trainer, bit for bit."""

import pytest
import torch
from accelerate import Accelerator
from conftest import make_batch
from torch.utils.data import DataLoader, IterableDataset
from trainers import HALF, RUN, dropout_free, slim_callback
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from hf_slim import SlimConfig, Slimmer, SlimTrainerCallback

STEPS, ROWS, CLIP = 12, 4, 0.5
EVERY_OTHER = {"save_strategy": "steps", "save_steps": 5}


class Rows(IterableDataset):
    """The same examples in the same order, for whatever reads them."""

    def __init__(self, model, count):
        batches = [make_batch(model, seed=3 + n) for n in range(count // 2)]
        self.rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(2)]

    def __iter__(self):  # noqa: D105
        yield from self.rows


def rate(optimizer):
    return get_linear_schedule_with_warmup(optimizer, 0, STEPS)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=RUN["learning_rate"], weight_decay=0.0)


def run_trainer(folder, family, accumulation=1, resume=False, **settings):
    model = dropout_free(family)
    args = TrainingArguments(
        folder,
        **{**RUN, **EVERY_OTHER, "max_steps": STEPS, "per_device_train_batch_size": ROWS},
        optim="adamw_torch",
        max_grad_norm=CLIP,
        gradient_accumulation_steps=accumulation,
    )
    callback = SlimTrainerCallback(SlimConfig(**{**HALF, **settings}))
    trainer = Trainer(model, args, train_dataset=Rows(model, STEPS * ROWS * accumulation), callbacks=[callback])
    trainer.model_accepts_loss_kwargs = False  # a mean over each batch, and over the batches of a step
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_plain(family, accumulation=1, **settings):
    model = dropout_free(family).train()
    optimizer = adamw(model)
    slimmer = Slimmer(model, SlimConfig(**{**HALF, **settings}), STEPS).attach(optimizer)
    schedule = rate(optimizer)
    for number, batch in enumerate(DataLoader(Rows(model, STEPS * ROWS * accumulation), batch_size=ROWS), 1):
        (model(**batch).loss / accumulation).backward()
        if number % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model, slimmer


def assert_same(model, other):
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def assert_same_masks(slimmer, other):
    assert slimmer.masks.keys() == other.masks.keys()
    assert all(mask.equal(other.masks[name]) for name, mask in slimmer.masks.items())
    assert slimmer.to_state() == other.to_state()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_plain_loop_is_the_trainer_bit_for_bit(family, live, tmp_path):
    trainer = run_trainer(tmp_path, family, slim_live=live)
    model, slimmer = run_plain(family, slim_live=live)
    assert slimmer.step == STEPS and slimmer.has_reached_target
    assert slimmer.is_live == live and slimmer.unproven == set()
    assert_same(trainer.model, model)
    assert_same_masks(slim_callback(trainer).slimming, slimmer)


@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_a_plain_loop_is_the_trainer_with_other_scores(criterion, tmp_path):
    trainer = run_trainer(tmp_path, "bert", slim_criterion=criterion, slim_scope="local")
    model, slimmer = run_plain("bert", slim_criterion=criterion, slim_scope="local")
    assert slimmer.is_live
    assert_same(trainer.model, model)
    assert_same_masks(slim_callback(trainer).slimming, slimmer)


def run_accelerate(folder, accumulation, stop=STEPS, resume=False, attach_late=False, **settings):
    """A loop of accelerate that saves at step 5, and begins there if it resumes."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = dropout_free("bert", seed=7 if resume else 0).train()
    optimizer = adamw(model)
    slimmer = Slimmer(model, SlimConfig(**{**HALF, **settings}), STEPS)
    loader = DataLoader(Rows(model, STEPS * ROWS * accumulation), batch_size=ROWS)
    if not attach_late:
        slimmer.attach(optimizer)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, rate(optimizer))
    if attach_late:
        slimmer.attach(optimizer)
    accelerator.register_for_checkpointing(slimmer)
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, slimmer.step * accumulation)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and slimmer.step == 5 and not resume:
            accelerator.save_state(folder)
        if slimmer.step == stop:
            break
    return model, slimmer


@pytest.mark.parametrize("live", [False, True])
def test_trainer_accelerate_and_plain_are_the_same_with_accumulation_and_checkpoints(live, tmp_path):
    trainer = run_trainer(tmp_path / "trainer", "bert", accumulation=2, slim_live=live)
    resumed = run_trainer(
        tmp_path / "trainer", "bert", accumulation=2, resume=str(tmp_path / "trainer" / "checkpoint-5"), slim_live=live
    )
    plain, plain_slimmer = run_plain("bert", accumulation=2, slim_live=live)
    whole, whole_slimmer = run_accelerate(tmp_path / "state", 2, attach_late=True, slim_live=live)
    again, again_slimmer = run_accelerate(tmp_path / "state", 2, resume=True, slim_live=live)
    for model, slimmer in (
        (resumed.model, slim_callback(resumed).slimming),
        (plain, plain_slimmer),
        (whole, whole_slimmer),
        (again, again_slimmer),
    ):
        assert slimmer.is_live == live
        assert_same(trainer.model, model)
        assert_same_masks(slim_callback(trainer).slimming, slimmer)
