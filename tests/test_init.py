"""The public names."""

import importlib
import pydoc

import pytest

import hf_slim

ROOMS = {
    "arguments": ["SlimArgumentsMixin", "SlimConfig", "SlimSeq2SeqTrainingArguments", "SlimTrainingArguments"],
    "compaction": ["model_slim"],
    "distillation": ["SlimTrainer", "SlimTrainerMixin"],
    "exports": ["export_gguf"],
    "one_shot": ["slim"],
    "saving": ["SlimReport", "plot_training", "push_slimmed", "renew_card", "save_slimmed"],
    "structures": [
        *("Discovery", "FfnLayout", "Fused", "Member", "MhaLayout", "Skipped", "Structure"),
        *("find_structures", "register_layout"),
    ],
    "training": ["SlimTrainerCallback", "Slimmer", "parse_auto_slim_config"],
}


def test_the_public_names_are_those_of_the_rooms():
    assert hf_slim.__all__ == sorted(name for names in ROOMS.values() for name in names)
    for room, names in ROOMS.items():
        for name in names:
            assert getattr(hf_slim, name) is getattr(importlib.import_module(f"hf_slim.{room}"), name)


def test_a_star_import_gives_the_public_names():
    names = {}
    exec("from hf_slim import *", names)
    assert names.keys() - {"__builtins__"} == set(hf_slim.__all__)


def test_dir_and_help_list_the_public_names():
    assert set(hf_slim.__all__) <= set(dir(hf_slim))
    text = pydoc.plain(pydoc.render_doc(hf_slim))
    assert all(name in text for name in hf_slim.__all__)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="^module 'hf_slim' has no attribute 'slim_everything'$"):
        hf_slim.slim_everything  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'slim_everything' from 'hf_slim'"):
        from hf_slim import slim_everything  # noqa: F401
