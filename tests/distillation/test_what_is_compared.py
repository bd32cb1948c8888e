"""What of model and teacher is compared, and what is refused since it cannot be."""

import pytest
from test_slim_trainer import ONLY, make
from trainers import dropout_free


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("who", ["model", "teacher"])
def test_outputs_without_names_are_refused(who, family, tmp_path):
    model, teacher = dropout_free(family), dropout_free(family, seed=3)
    (model if who == "model" else teacher).config.return_dict = False
    trainer = make(model, tmp_path, teacher_model=teacher, **ONLY)
    with pytest.raises(ValueError, match="gives neither logits nor embeddings.* no named outputs.* return_dict=True"):
        trainer.train()
