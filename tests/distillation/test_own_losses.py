"""Losses of a class's own: the teacher is asked beside them, or the training is refused."""

import pytest
from test_slim_trainer import ONLY, entries, make
from torch import nn
from trainers import dropout_free
from transformers import Trainer

from hf_slim import SlimTrainer, SlimTrainerMixin


def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    labels = inputs.pop("labels")
    output = model(**inputs)
    loss = 10 * nn.functional.cross_entropy(output.logits, labels)
    return (loss, output) if return_outputs else loss


class Own(SlimTrainer):
    """A loss that does not call that of SlimTrainer."""

    compute_loss = compute_loss


class Base(Trainer):
    """A loss in the class that is mixed with."""

    compute_loss = compute_loss


class Mixed(SlimTrainerMixin, Base):
    """SlimTrainerMixin first."""


class Last(Base, SlimTrainer):
    """SlimTrainer last."""


class OwnStep(SlimTrainer):
    """A step that computes no loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("trainer_class", [Own, Mixed, Last])
def test_a_loss_of_a_class_s_own_is_weighted_with_the_teacher(trainer_class, tmp_path):
    logged = []
    for one in (SlimTrainer, trainer_class):
        trainer = make(dropout_free(), tmp_path, one, teacher_model=dropout_free(seed=3), **{**ONLY, "max_steps": 1})
        trainer.train()
        logged.append([entries(trainer, name)[0] for name in ("task_loss", "distill_loss", "loss")])
    (task, distance, _), own = logged
    assert own == pytest.approx([10 * task, distance, (10 * task + distance) / 2], rel=1e-4)


def test_a_step_that_does_not_ask_the_teacher_is_refused(tmp_path):
    trainer = make(dropout_free(), tmp_path, OwnStep, teacher_model=dropout_free(seed=3), **ONLY)
    with pytest.raises(ValueError, match="The teacher was not asked: a step of OwnStep does not call"):
        trainer.train()
    assert trainer.state.global_step == 0
    make(dropout_free(), tmp_path, OwnStep, **ONLY).train()  # without a teacher it is as it was
