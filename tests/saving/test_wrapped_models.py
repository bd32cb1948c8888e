"""Modules that hold transformers models and save themselves: their folders, copies and checks."""

import pytest
import torch
from conftest import logits, make_batch
from sparse_models import Holder, masked
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_slim import model_slim, save_slimmed
from hf_slim.proof.made_inputs import make_inputs
from hf_slim.proof.output_comparison import VerificationError
from hf_slim.saving.wrapped_models import copy_model, find_pretrained


class Forgetful(Holder):
    def save_pretrained(self, folder):
        torch.save(self.state_dict(), f"{folder}.pt")


class Changing(Holder):
    @classmethod
    def from_pretrained(cls, folder):
        loaded = super().from_pretrained(folder)
        loaded.model.classifier.bias.data += 1
        return loaded


class Pair(nn.Module):
    """Two transformers models, one of them also under another name."""

    def __init__(self, one, other):
        super().__init__()
        self.parts = nn.ModuleList([one, other])
        self.again = one

    def save_pretrained(self, folder):
        for number, part in enumerate(self.parts):
            part.save_pretrained(f"{folder}/{number}")

    @classmethod
    def from_pretrained(cls, folder):
        load = AutoModelForSequenceClassification.from_pretrained
        return cls(load(f"{folder}/0"), load(f"{folder}/1"))


def test_any_module_that_saves_itself(tmp_path):
    holder = Holder(masked())
    holder.trainer = object()  # shared with the copy, not copied
    report = save_slimmed(holder, tmp_path / "slim")
    assert report.structures[0].name == "model.bert.encoder.layer.0.attention.output.dense"
    assert (tmp_path / "slim" / "inner" / "modeling_hf_slim.py").exists() and (tmp_path / "slim/README.md").exists()
    loaded = Holder.from_pretrained(tmp_path / "slim").eval()
    batch = make_batch(holder.model)
    torch.testing.assert_close(logits(loaded.model, batch), logits(holder.model, batch), atol=1e-5, rtol=1e-4)
    model_slim(holder)
    assert sum(p.numel() for p in holder.parameters()) == report.parameters_after
    assert "hf_slim" in holder.model.config.to_dict()


@pytest.mark.parametrize(
    ("cls", "error", "message"),
    [
        (Forgetful, ValueError, "does not save the BertForSequenceClassification in it by save_pretrained"),
        (Changing, VerificationError, "loads another model.classifier.bias from the saved folder"),
    ],
)
def test_a_module_that_does_not_give_its_models_again_is_refused(cls, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_slimmed(cls(masked()), tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_several_models_in_one_module(tmp_path):
    pair = Pair(masked(), masked(seed=7))
    assert find_pretrained(pair) == [*pair.parts]
    report = save_slimmed(pair, tmp_path / "slim")
    assert report.parameters_after < report.parameters_before and len(report.structures) == 8
    loaded = Pair.from_pretrained(tmp_path / "slim").eval()
    for part, original in zip(loaded.parts, pair.parts, strict=True):
        batch = make_batch(original)
        torch.testing.assert_close(logits(part, batch), logits(original, batch), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="one batch cannot be for 2 models"):
        save_slimmed(pair, tmp_path / "again", verify=make_inputs(pair.parts[0]))


def test_a_copy_shares_nothing_that_is_slimmed():
    holder = Holder(masked())
    holder.settings, holder.config = {"data": object()}, holder.model.config
    copied = copy_model(holder)
    assert copied.settings is holder.settings
    assert copied.config is copied.model.config is not holder.model.config
    assert all(a is not b for a, b in zip(copied.parameters(), holder.parameters(), strict=True))
