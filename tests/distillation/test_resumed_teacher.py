"""A training that is resumed has the teacher that it had, and no other."""

import copy

import pytest
import torch
from test_slim_trainer import make
from trainers import EVERY, HALF, RUN, dropout_free, make_data, weights
from transformers import Trainer, TrainingArguments

from hf_slim import SlimTrainer, SlimTrainerCallback
from hf_slim.distillation.teachers import make_fingerprint

SAVED = {**HALF, **EVERY, "slim_live": False}


@pytest.mark.parametrize("how", ["SlimTrainer", "callback", "Trainer"])
def test_a_checkpoint_with_a_teacher_is_not_resumed_without(how, tmp_path):
    make(dropout_free(), tmp_path, teacher_model=dropout_free(seed=3), **SAVED).train()
    if how == "Trainer":
        args = TrainingArguments(tmp_path, **{**RUN, **EVERY, "max_steps": 14})
        trainer = Trainer(dropout_free(), args, train_dataset=make_data(dropout_free()))
    else:
        trainer_class, callbacks = (SlimTrainer, []) if how == "SlimTrainer" else (Trainer, [SlimTrainerCallback()])
        trainer = make(dropout_free(), tmp_path, trainer_class, callbacks=callbacks, **SAVED)
    with pytest.raises(ValueError, match="checkpoint of step 9 was trained with a teacher, and this trainer has none"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_a_teacher_may_be_added_when_resuming(tmp_path):
    make(dropout_free(), tmp_path, **SAVED).train()
    trainer = make(dropout_free(), tmp_path, teacher_model=dropout_free(seed=3), **SAVED)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert sum("distill_loss" in entry for entry in trainer.state.log_history) == 3


@pytest.mark.parametrize("how", ["given", "self"])
def test_a_teacher_in_another_type_is_a_copy_and_known_again(how, tmp_path):
    teacher = dropout_free(seed=3) if how == "given" else None
    name = {} if teacher is not None else {"slim_teacher": "self"}
    before = weights(teacher) if teacher is not None else {}
    trainer = make(dropout_free(), tmp_path, teacher_model=teacher, slim_teacher_dtype="bfloat16", **name, **SAVED)
    trainer.train()
    expected = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in trainer.model.state_dict().items())
    if teacher is not None:
        assert trainer.teacher_model is teacher
        assert all(p.dtype == torch.float32 for p in teacher.parameters())
        assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    else:
        assert {p.dtype for p in trainer.teacher_model.parameters()} == {torch.bfloat16}


def test_a_fingerprint_tells_all_values_and_the_config():
    teacher = dropout_free()
    known = make_fingerprint(teacher)
    assert make_fingerprint(copy.deepcopy(teacher)) == known
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        changed.bert.encoder.layer[1].output.dense.weight[-1, -1] += 1e-3
    activated = copy.deepcopy(teacher)
    activated.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    configured = copy.deepcopy(teacher)
    configured.config.layer_norm_eps = 1e-3
    for other in (changed, activated, configured):
        assert make_fingerprint(other) != known


def test_a_saved_teacher_has_the_fingerprint_that_it_had(tmp_path):
    teacher = dropout_free()
    known = make_fingerprint(teacher)
    teacher.save_pretrained(tmp_path)
    assert make_fingerprint(teacher) == known
    assert make_fingerprint(type(teacher).from_pretrained(tmp_path)) == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_every_type_has_a_fingerprint(dtype):
    module = torch.nn.Module()
    module.register_parameter("weight", torch.nn.Parameter(torch.ones(3, 100, dtype=dtype).T, requires_grad=False))
    known = make_fingerprint(module)
    module.weight[99, 2] = 2
    assert make_fingerprint(module) != known
