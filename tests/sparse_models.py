"""Models with zero units, and what holds them."""

import copy

from conftest import build, half_masks
from tiny import build_tiny
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_slim import find_structures, model_slim
from hf_slim.compaction.zeros import zero_units


def masked(family="bert", **changes):
    """A tiny model with half of its units zero."""
    model = build(family, **changes)
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    return model


def masked_and_slim(model_type, auto_class="AutoModel"):
    """A tiny model with half of its units zero, and its slimmed copy."""
    model = build_tiny(model_type, auto_class)
    structures = find_structures(model).structures
    assert {s.kind for s in structures} == {"ffn", "mha"}
    zero_units(model, structures, half_masks(structures, keep=lambda s: max(1, s.units // 2)))
    slim = copy.deepcopy(model)
    model_slim(slim, round_multiplier=1)
    return model, slim


class Holder(nn.Module):
    """A module that holds transformers models and saves itself in a way of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def save_pretrained(self, folder):
        self.model.save_pretrained(f"{folder}/inner")

    @classmethod
    def from_pretrained(cls, folder):
        return cls(AutoModelForSequenceClassification.from_pretrained(f"{folder}/inner"))
