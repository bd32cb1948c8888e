"""Losses of a class's own: the teacher is asked beside them, or the training is refused."""

import pytest
import torch
from test_slim_trainer import ONLY, entries, make, other
from torch import nn
from trainers import dropout_free, make_data
from transformers import Trainer

from hf_slim import SlimTrainer, SlimTrainerMixin, SlimTrainingArguments
from hf_slim.distillation.counted_items import depends_on, make_probe


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


def smoothed(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("function", [None, smoothed], ids=["own", "function"])
@pytest.mark.parametrize("family", ["bert", "t5", "vit", "gpt2"])
def test_accumulation_leaves_the_balance_of_the_two_losses(family, function, tmp_path):
    if function is not None and family != "bert":
        pytest.skip("one family is enough")
    data = make_data(dropout_free(family))[:8]
    logged = []
    for steps in (1, 2, 4):
        settings = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
        args = SlimTrainingArguments(tmp_path, **{**ONLY, **settings})
        teacher = other(dropout_free(family))
        trainer = SlimTrainer(
            dropout_free(family), args, train_dataset=data, teacher_model=teacher, compute_loss_func=function
        )
        trainer.train()
        task, distance = entries(trainer, "task_loss")[0], entries(trainer, "distill_loss")[0]
        assert entries(trainer) == [pytest.approx((task + distance) / 2, rel=1e-4)]
        logged.append((task, distance))
    ratios = [distance / task for task, distance in logged]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-4)
    plain = make(dropout_free(family), tmp_path, Trainer, data=data, **{**ONLY, **settings})
    if function is None:
        plain.train()
        assert logged[-1][0] == pytest.approx(entries(plain)[0], rel=1e-3)  # the task's loss is that of a Trainer


def test_the_graph_tells_what_divides_a_loss():
    probe = make_probe(torch.tensor(7))
    weight = torch.ones(3, requires_grad=True)
    assert probe.item() == 7
    assert depends_on((weight * 2).sum() / probe, probe)
    assert not depends_on((weight * 2).mean(), probe)
    assert not depends_on(torch.tensor(1.0), probe)
