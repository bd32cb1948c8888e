"""Live compaction: the same training as with masks, on a model that shrinks under way."""

import pytest
import torch
from conftest import build
from test_callback import make_trainer, slim_callback
from transformers import TrainerCallback

from hf_slim import find_structures

NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "electra": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
    "bart": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
    "t5-gated": {"dropout_rate": 0.0},
    "vit": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


class Trajectory(TrainerCallback):
    """Keeps the loss, the masks and the number of parameters of every step."""

    def __init__(self):
        self.losses, self.masks, self.sizes = [], [], []

    def on_log(self, args, state, control, logs, model, **kwargs):
        if "loss" in logs:
            callback = self.watched
            self.losses.append((logs["loss"], logs.get("grad_norm")))
            self.masks.append({name: mask.clone() for name, mask in callback.masks.items()})
            self.sizes.append(sum(p.numel() for p in model.parameters()))


def run(family, folder, *, live, spread=0.1, **settings):
    trainer = make_trainer(
        build(family, spread=spread, **NO_DROPOUT.get(family, {})), folder, slim_live=live, **settings
    )
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
