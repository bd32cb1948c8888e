"""A training that is resumed has the teacher that it had, and no other."""

import pytest
from test_slim_trainer import make
from trainers import EVERY, HALF, RUN, dropout_free, make_data
from transformers import Trainer, TrainingArguments

from hf_slim import SlimTrainer, SlimTrainerCallback

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
