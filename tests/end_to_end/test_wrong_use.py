"""Wrong uses: each fails where it is made, before any work is done, and says what to do instead."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from commands import refuse
from conftest import build, half_masks, make_batch
from huggingface_hub.errors import HFValidationError
from transformers import Trainer, TrainingArguments

from hf_slim import (
    SlimConfig,
    SlimTrainerCallback,
    SlimTrainingArguments,
    find_structures,
    model_slim,
    parse_auto_slim_config,
    save_slimmed,
)
from hf_slim.arguments import place_steps
from hf_slim.compaction.cut_tensors import compact_model
from hf_slim.compaction.zeros import zero_units
from hf_slim.proof.output_comparison import VerificationError
from hf_slim.saving.report import measure_latency
from hf_slim.training.schedule import Schedule

NAN, INF = math.nan, math.inf
HALF = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "slim_round_to": 8, "slim_start": 2, "slim_end": 8}
LAYER = "bert.encoder.layer.0.output.dense"

FIELDS = [
    ({"ffn2_sparsity": 1.0}, r"^ffn2_sparsity must be in \[0, 1\), got 1.0: it is the fraction to remove"),
    ({"ffn2_sparsity": 80}, r"^ffn2_sparsity must be in \[0, 1\), got 80"),
    ({"ffn2_sparsity": -INF}, r"^ffn2_sparsity must be in \[0, 1\), got -inf"),
    ({"ffn2_sparsity": True}, "^ffn2_sparsity must be a number, got True"),
    ({"ffn2_sparsity": [0.5]}, r"^ffn2_sparsity must be a number, got \[0.5\]"),
    ({"ffn2_sparsity": np.float32(0.5)}, r"^ffn2_sparsity must be a number, got .*0.5.*: give a Python int or float"),
    ({"mha_sparsity": -0.1}, r"^mha_sparsity must be in \[0, 1\), got -0.1"),
    ({"mha_sparsity": NAN}, r"^mha_sparsity must be in \[0, 1\), got nan"),
    ({"mha_sparsity": "half"}, "^mha_sparsity must be a number, got 'half'"),
    ({"mha_sparsity": None}, "^mha_sparsity must be a number, got None"),
    ({"slim_start": -1}, r"^slim_start must be a step \(a whole number from 1\) or a fraction of training .* got -1"),
    ({"slim_start": 2.5}, "^slim_start must be a step .* got 2.5"),
    ({"slim_start": NAN}, "^slim_start must be a step .* got nan"),
    ({"slim_start": INF}, "^slim_start must be a step .* got inf"),
    ({"slim_start": False}, "^slim_start must be a number, got False"),
    ({"slim_end": 1.5}, "^slim_end must be a step .* got 1.5"),
    ({"slim_end": NAN}, "^slim_end must be a step .* got nan"),
    ({"slim_end": INF}, "^slim_end must be a step .* got inf"),
    ({"slim_end": 1.0}, "^slim_end=1.0 is ambiguous: write the step 1 as a whole number"),
    ({"slim_end": "0.9"}, "^slim_end must be a number, got '0.9'"),
    ({"slim_end": []}, r"^slim_end must be a number, got \[\]"),
    ({"slim_end": 0}, "^slim_start must not be after slim_end, got slim_start=0.05, slim_end=0"),
    ({"slim_start": 0.6, "slim_end": 0.5}, "^slim_start must not be after slim_end, got slim_start=0.6"),
    ({"slim_start": 20, "slim_end": 10}, "^slim_start must not be after slim_end, got slim_start=20, slim_end=10"),
    ({"slim_frequency": 0}, "^slim_frequency must be above 0, got 0: it is the distance between two pruning steps"),
    ({"slim_frequency": -0.1}, "^slim_frequency must be a step .* got -0.1"),
    ({"slim_frequency": NAN}, "^slim_frequency must be a step .* got nan"),
    ({"slim_frequency": INF}, "^slim_frequency must be a step .* got inf"),
    ({"slim_frequency": None}, "^slim_frequency must be a number, got None"),
    ({"slim_schedule": "quick"}, "^slim_schedule must be one of exp, cubic, cos, linear, oneshot, got 'quick'"),
    ({"slim_schedule": ["exp"]}, r"^slim_schedule must be one of .* got \['exp'\]"),
    ({"slim_criterion": "l2"}, "^slim_criterion must be one of magnitude, snip_momentum, taylor, fisher, got 'l2'"),
    ({"slim_criterion": None}, "^slim_criterion must be one of .* got None"),
    ({"slim_scope": "layer"}, "^slim_scope must be one of global, local, got 'layer'"),
    ({"slim_scope": 1}, "^slim_scope must be one of global, local, got 1"),
    ({"slim_round_to": 0}, "^slim_round_to must be a whole number from 1, got 0"),
    ({"slim_round_to": 8.0}, "^slim_round_to must be a whole number from 1, got 8.0"),
    ({"slim_round_to": True}, "^slim_round_to must be a whole number from 1, got True"),
    ({"slim_round_to": "32"}, "^slim_round_to must be a whole number from 1, got '32'"),
    ({"slim_min_heads": 0}, "^slim_min_heads must be a whole number from 1, got 0"),
    ({"slim_min_heads": NAN}, "^slim_min_heads must be a whole number from 1, got nan"),
    ({"slim_min_heads": INF}, "^slim_min_heads must be a whole number from 1, got inf"),
    ({"slim_min_heads": None}, "^slim_min_heads must be a whole number from 1, got None"),
    ({"slim_exclude": 3}, "^slim_exclude must be a list of patterns, got 3"),
    ({"slim_exclude": {"layer.0": True}}, "^slim_exclude must be a list of patterns, got {'layer.0': True}"),
    ({"slim_exclude": [3]}, "^slim_exclude must hold patterns, that is strings that are not empty, got 3"),
    ({"slim_exclude": ["layer.0", None]}, "^slim_exclude must hold patterns, .* got None"),
    ({"slim_exclude": ""}, "^slim_exclude must hold patterns, that is strings that are not empty, got ''"),
    ({"slim_exclude": ["(layer"]}, r"'\(layer' is neither a shell-style pattern nor a regular expression: missing \)"),
    ({"slim_exclude": ["["]}, r"'\[' is neither a shell-style pattern nor a regular expression: unterminated"),
]


@pytest.mark.parametrize("cls", [SlimConfig, lambda **values: SlimTrainingArguments("out", **values)])
@pytest.mark.parametrize(
    ("values", "message"), FIELDS, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_fields(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def masked():
    model = build("bert")
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures))
    return model


def entry(**changes):
    """The FFN entry for a tiny BERT; a key that is changed to `...` is left out."""
    changed = {**parse_auto_slim_config(build("bert"), 0.5, 0.0)[0], **changes}
    return {key: value for key, value in changed.items() if value is not ...}


def parse(**keywords):
    return parse_auto_slim_config(build("bert"), **keywords)


def save(folder, **keywords):
    return save_slimmed(masked(), folder / "slim", **keywords)


def save_nan(folder):
    model = masked()
    model.classifier.weight.data[0] = NAN
    save_slimmed(model, folder / "slim", verify=make_batch(model))


def save_over_a_file(folder):
    (folder / "slim").write_text("mine")
    save(folder)


def train(folder, *callbacks, model=None, config=None, added=(), **settings):
    """Train a tiny BERT for 12 steps; plain arguments where there are no settings."""
    fields = {"max_steps": 12, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = (
        SlimTrainingArguments(folder, **fields, **settings) if settings else TrainingArguments(folder, **fields)
    )
    model = model or build("bert")
    data = [{key: value[0] for key, value in make_batch(model).items()}]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[*(callbacks or [SlimTrainerCallback(config)])])
    for callback in added:
        trainer.add_callback(callback)
    before = copy.deepcopy(model.state_dict())
    try:
        trainer.train()
    finally:
        assert trainer.state.global_step == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def frozen():
    model = build("bert")
    model.bert.encoder.layer[1].requires_grad_(False)
    return model


def on_meta():
    with torch.device("meta"):
        return transformers.BertModel(build("bert").config)


def from_record(record):
    fields = build("bert").config.to_dict() | {"hf_slim": record}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**fields))


WEIGHT = "encoder.layer.1.output.dense.weight"


def shapes(name=WEIGHT, shape=(32, 8), **changes):
    names = {"version": 1, "model": "BertForSequenceClassification", "base": "BertModel"}
    return {**names, "shapes": {name: list(shape)}, "attributes": {}, "infer": [], **changes}


def keep_none():
    model = build("bert")
    structures = find_structures(model).structures
    compact_model(model, structures, {s.name: torch.zeros(s.units, dtype=torch.bool) for s in structures})


RUN = ["run", "--config_name", "c", "--train_file", "t.csv"]
LINEAR = torch.nn.Linear(2, 2)
A_MODEL = r"A model \(a torch.nn.Module\) is needed, got {}: load or build it first"
TAKES = "SlimTrainerCallback takes a SlimConfig, the list that parse_auto_slim_config returns, or nothing .* got {}"

CALLS = {
    # Arguments that already know the length of the training.
    "an end beyond the training": (
        lambda _: SlimTrainingArguments("out", max_steps=12, ffn2_sparsity=0.5, slim_end=13),
        ValueError,
        "slim_end=13 is beyond the last training step, 12: .* Make slim_end smaller, or train longer",
    ),
    "a start after the end": (
        lambda _: SlimTrainingArguments("out", max_steps=12, mha_sparsity=0.5, slim_start=9, slim_end=0.5),
        ValueError,
        "slim_start=9 is step 9 of 12, after slim_end=0.5, which is step 6: make slim_start smaller",
    ),
    "a schedule of an unknown curve": (
        lambda _: Schedule((2, 4, 6), 0.5, "quick").sparsity_at(4),
        ValueError,
        "slim_schedule must be one of exp, cubic, cos, linear, oneshot, got 'quick'",
    ),
    "a schedule with a fraction after a step": (
        lambda _: place_steps(SlimConfig(slim_start=0.9, slim_end=8), 12),
        ValueError,
        "slim_start=0.9 is step 11 of 12, after slim_end=8, which is step 8",
    ),
    "fields of an object that has none": (
        lambda _: SlimConfig.from_arguments(None),
        ValueError,
        "NoneType has no field 'ffn2_sparsity': train with SlimTrainingArguments",
    ),
    "fields that went bad": (
        lambda _: SlimConfig.from_arguments(type("Bad", (), {**vars(SlimConfig()), "slim_end": NAN})),
        ValueError,
        "slim_end must be a step .* got nan",
    ),
    "an unknown field": (lambda _: SlimConfig(ffn_sparsity=0.5), TypeError, "unexpected keyword .* 'ffn_sparsity'"),
    "a copy with a bad field": (
        lambda _: replace(SlimConfig(), slim_scope="all"),
        ValueError,
        "slim_scope must be one",
    ),
    # SlimTrainerCallback.
    "a number for the config": (lambda _: SlimTrainerCallback(0.5), ValueError, TAKES.format("float")),
    "a string for the config": (lambda _: SlimTrainerCallback("slim.json"), ValueError, TAKES.format("str")),
    "a class for the config": (lambda _: SlimTrainerCallback(SlimConfig), ValueError, TAKES.format("type")),
    "training arguments for the config": (
        lambda _: SlimTrainerCallback(SlimTrainingArguments("out", ffn2_sparsity=0.5)),
        ValueError,
        TAKES.format("SlimTrainingArguments"),
    ),
    "a model for the config": (lambda _: SlimTrainerCallback(LINEAR), ValueError, TAKES.format("Linear")),
    "unknown fields in a dict": (
        lambda _: SlimTrainerCallback({"ffn_sparsity": 0.5}),
        ValueError,
        "'ffn_sparsity' is not a field of SlimConfig; its fields are ffn2_sparsity, mha_sparsity",
    ),
    "a bad value in a dict": (lambda _: SlimTrainerCallback({"slim_end": NAN}), ValueError, "slim_end must be a step"),
    "one entry without its list": (
        lambda _: SlimTrainerCallback(entry()),
        ValueError,
        "'op_names' is not a field of SlimConfig; .* Entries of parse_auto_slim_config go into a list",
    ),
    "a list of numbers": (lambda _: SlimTrainerCallback([3]), ValueError, "An auto-slim entry must be a dict, got 3"),
    "a list of settings": (
        lambda _: SlimTrainerCallback([SlimConfig()]),
        ValueError,
        r"An auto-slim entry must be a dict, got SlimConfig\(.*take the entries from parse_auto_slim_config",
    ),
    "an unknown key": (
        lambda _: SlimTrainerCallback([entry(prune_layers=3)]),
        ValueError,
        "prune_layers is not known in an auto-slim entry; known are end_step, op_names",
    ),
    "a key that is no string": (lambda _: SlimTrainerCallback([entry() | {3: 4}]), ValueError, "3 is not known in an"),
    "no op_names": (
        lambda _: SlimTrainerCallback([entry(op_names=...)]),
        ValueError,
        "entry lacks op_names; take the",
    ),
    "no pattern": (lambda _: SlimTrainerCallback([entry(pattern=...)]), ValueError, "entry lacks pattern"),
    "no sparsity": (lambda _: SlimTrainerCallback([entry(target_sparsity=...)]), ValueError, "lacks target_sparsity"),
    "an unknown pattern": (
        lambda _: SlimTrainerCallback([entry(pattern="4x1")]),
        ValueError,
        "pattern must be one of channelx1, mha, got '4x1'",
    ),
    "a list for the pattern": (
        lambda _: SlimTrainerCallback([entry(pattern=["mha"])]),
        ValueError,
        r"pattern must be one of channelx1, mha, got \['mha'\]",
    ),
    "empty op_names": (
        lambda _: SlimTrainerCallback([entry(op_names=[])]),
        ValueError,
        "op_names of the entry with pattern 'channelx1' is empty: name layers, or leave the entry out",
    ),
    "a string for op_names": (
        lambda _: SlimTrainerCallback([entry(op_names=LAYER)]),
        ValueError,
        f"op_names must be a list of the names of layers, got '{LAYER}'",
    ),
    "numbers in op_names": (
        lambda _: SlimTrainerCallback([entry(op_names=[0, 1])]),
        ValueError,
        r"op_names must be a list of the names of layers, got \[0, 1\]",
    ),
    "a layer in two entries": (
        lambda _: SlimTrainerCallback([entry(), entry(op_names=[LAYER])]),
        ValueError,
        f"op_names: {LAYER} is in more than one entry; name each layer once",
    ),
    "a bad sparsity in an entry": (
        lambda _: SlimTrainerCallback([entry(target_sparsity=1.0)]),
        ValueError,
        r"sparsity must be in \[0, 1\), got 1.0",
    ),
    "a sparsity of a tensor": (
        lambda _: SlimTrainerCallback([entry(target_sparsity=torch.tensor(0.5))]),
        ValueError,
        r"sparsity must be a number, got tensor\(0.5000\): give a Python int or float",
    ),
    "a bad decay in an entry": (
        lambda _: SlimTrainerCallback([entry(sparsity_decay_type="quick")]),
        ValueError,
        "sparsity_decay_type must be one of exp, cubic, cos, linear, oneshot, got 'quick'",
    ),
    "two callbacks": (
        lambda tmp: train(tmp, SlimTrainerCallback(), SlimTrainerCallback(), **HALF),
        ValueError,
        "more than one SlimTrainerCallback, and each would drop units of the same model: keep one",
    ),
    "two callbacks, one added later": (
        lambda tmp: train(tmp, SlimTrainerCallback(), added=[SlimTrainerCallback()], **HALF),
        ValueError,
        "more than one SlimTrainerCallback",
    ),
    # Training that the model or the run does not allow: refused before the first step, the model untouched.
    "arguments without the fields": (
        train,
        ValueError,
        "TrainingArguments has no field 'ffn2_sparsity': .* or pass a SlimConfig to SlimTrainerCallback",
    ),
    "an end beyond a training of plain arguments": (
        lambda tmp: train(tmp, config=SlimConfig(**HALF | {"slim_end": 13})),
        ValueError,
        "slim_end=13 is beyond the last training step, 12",
    ),
    "an entry that ends beyond training": (
        lambda tmp: train(tmp, config=[entry(end_step=13)]),
        ValueError,
        "slim_end=13 is beyond the last training step, 12",
    ),
    "a start after the end of plain arguments": (
        lambda tmp: train(tmp, config=SlimConfig(**HALF | {"slim_start": 9, "slim_end": 0.5})),
        ValueError,
        "slim_start=9 is step 9 of 12, after slim_end=0.5, which is step 6",
    ),
    "layers of another model": (
        lambda tmp: train(tmp, config=[entry(op_names=["encoder.fc2"])]),
        ValueError,
        "op_names: encoder.fc2 cannot be slimmed as channelx1: not a layer of this model's structures",
    ),
    "a part of a structure": (
        lambda tmp: train(tmp, config=[entry(pattern="mha", op_names=["bert.encoder.layer.0.attention.self.query"])]),
        ValueError,
        "attention.self.query cannot be slimmed as mha: .* or only a part of one is named",
    ),
    "a pattern that matches nothing": (
        lambda tmp: train(tmp, **HALF, slim_exclude=["encoder.layers.0"]),
        ValueError,
        f"slim_exclude: the pattern 'encoder.layers.0' matches no module .* The structures are: .*{LAYER}",
    ),
    "a regular expression with flags that matches nothing": (
        lambda tmp: train(tmp, **HALF, slim_exclude=["(?i)LAYER.7"]),
        ValueError,
        r"slim_exclude: the pattern '\(\?i\)LAYER.7' matches no module",
    ),
    "patterns that leave nothing": (
        lambda tmp: train(tmp, **HALF, slim_exclude=["layer.*"]),
        ValueError,
        r"slim_exclude=\['layer\.\*'\] leaves no ffn structure to slim",
    ),
    "frozen weights and a gradient": (
        lambda tmp: train(tmp, model=frozen(), **HALF),
        ValueError,
        "layer.1.output.dense.weight is frozen, so slim_criterion='taylor' cannot score .* slim_criterion='magnitude'",
    ),
    "frozen weights and an entry": (
        lambda tmp: train(tmp, model=frozen(), config=[entry(end_step=8)]),
        ValueError,
        "layer.1.output.dense.weight is frozen, so slim_criterion='snip_momentum' cannot score",
    ),
    "channels below the floor, local": (
        lambda tmp: train(tmp, **HALF | {"slim_round_to": 64, "slim_scope": "local"}),
        ValueError,
        "ffn2_sparsity=0.5 is unreachable: of the 64 units .* slim_round_to=64 .* Lower ffn2_sparsity or slim_",
    ),
    "channels below the floor, global": (
        lambda tmp: train(tmp, **HALF | {"ffn2_sparsity": 0.8, "slim_round_to": 16}),
        ValueError,
        "ffn2_sparsity=0.8 is unreachable: of the 128 units of 2 structures, slim_round_to=16 .* so 0.75 is the most",
    ),
    "heads below the floor, local": (
        lambda tmp: train(tmp, **HALF | {"slim_min_heads": 3, "slim_scope": "local"}),
        ValueError,
        "mha_sparsity=0.5 is unreachable: of the 4 units .* slim_min_heads=3 .* so 0.25 is the most. Lower mha_",
    ),
    "heads below the floor, global": (
        lambda tmp: train(tmp, **HALF | {"slim_min_heads": 3}),
        ValueError,
        "mha_sparsity=0.5 is unreachable: of the 8 units of 2 structures, slim_min_heads=3 .* so 0.25 is the most",
    ),
    # parse_auto_slim_config.
    "parse: a sparsity of 1": (
        lambda _: parse(ffn2_sparsity=1.5),
        ValueError,
        r"ffn2_sparsity must be in \[0, 1\), got 1.5: it is the fraction to remove",
    ),
    "parse: a sparsity of nan": (
        lambda _: parse(mha_sparsity=NAN),
        ValueError,
        r"mha_sparsity must be in \[0, 1\), got",
    ),
    "parse: no sparsity": (lambda _: parse(mha_sparsity=None), ValueError, "mha_sparsity must be a number, got None"),
    "parse: a string": (lambda _: parse(ffn2_sparsity="0.5"), ValueError, "ffn2_sparsity must be a number, got '0.5'"),
    "parse: a switch": (lambda _: parse(ffn2_sparsity=False), ValueError, "ffn2_sparsity must be a number, got False"),
    "parse: an unknown keyword": (
        lambda _: parse(start=3),
        TypeError,
        "unexpected keyword argument 'start'; it takes start_step, end_step, pruning_frequency",
    ),
    "parse: a keyword of its own": (lambda _: parse(op_names=[LAYER]), TypeError, "unexpected keyword .* 'op_names'"),
    "parse: a bad step": (lambda _: parse(start_step="2"), ValueError, "^start_step must be a number, got '2'"),
    "parse: a step of nan": (lambda _: parse(end_step=NAN), ValueError, "^end_step must be a step .* got nan"),
    "parse: steps in the wrong order": (
        lambda _: parse(start_step=9, end_step=3),
        ValueError,
        "^start_step must not be after end_step, got start_step=9, end_step=3",
    ),
    "parse: no frequency": (lambda _: parse(pruning_frequency=0), ValueError, "^pruning_frequency must be above 0"),
    "parse: a bad scope": (
        lambda _: parse(pruning_scope="layer"),
        ValueError,
        "^pruning_scope must be one of global, local, got 'layer'",
    ),
    "parse: a bad decay": (
        lambda _: parse(sparsity_decay_type="quick"),
        ValueError,
        "^sparsity_decay_type must be one",
    ),
    "parse: a bad criterion": (
        lambda _: parse(pruning_type="l2"),
        ValueError,
        "^pruning_type must be one of magnitude",
    ),
    "parse: nothing to slim": (
        lambda _: parse_auto_slim_config(LINEAR),
        ValueError,
        r"Linear has no feed-forward network that can be slimmed. .*parameters:\n  itself \(Linear\): \d+",
    ),
    "parse: a name": (lambda _: parse_auto_slim_config("bert"), ValueError, A_MODEL.format("str")),
    "parse: no model": (lambda _: parse_auto_slim_config(None, 0.0, 0.0), ValueError, A_MODEL.format("NoneType")),
    # find_structures and model_slim.
    "find: a state dict": (lambda _: find_structures(LINEAR.state_dict()), ValueError, A_MODEL.format("OrderedDict")),
    "find: a class": (lambda _: find_structures(transformers.BertModel), ValueError, A_MODEL.format("type")),
    "find: a config": (lambda _: find_structures(build("bert").config), ValueError, A_MODEL.format("BertConfig")),
    "slim: not a module": (lambda _: model_slim("out/slim"), ValueError, A_MODEL.format("str")),
    "slim: nothing to slim": (
        lambda _: model_slim(LINEAR),
        ValueError,
        r"Linear has no structure that can be slimmed. Nothing in it looks like one. .*\n  itself \(Linear\): \d+",
    ),
    "slim: a multiplier of 0": (
        lambda _: model_slim(masked(), 0),
        ValueError,
        "round_multiplier must be a whole number from 1, got 0",
    ),
    "slim: a float": (lambda _: model_slim(masked(), 8.0), ValueError, "round_multiplier must be .* got 8.0"),
    "slim: a switch": (lambda _: model_slim(masked(), True), ValueError, "round_multiplier must be .* got True"),
    "slim: nan": (lambda _: model_slim(masked(), NAN), ValueError, "round_multiplier must be .* got nan"),
    "slim: a string": (lambda _: model_slim(masked(), "8"), ValueError, "round_multiplier must be .* got '8'"),
    "slim: a model without weights": (
        lambda _: model_slim(on_meta()),
        ValueError,
        "layer.0.* is on the meta device, where tensors have no values: load the model whole",
    ),
    # What only a caller of the inner functions can do.
    "compact: nothing kept": (
        lambda _: keep_none(),
        ValueError,
        "the mask keeps none of the 4 units; keep one at least",
    ),
    "latency: no repeats": (
        lambda _: measure_latency({}, {}, repeats=0),
        ValueError,
        "repeats must be at least 1, got 0",
    ),
    # save_slimmed.
    "save: another module": (
        lambda tmp: save_slimmed(LINEAR, tmp / "slim"),
        ValueError,
        "save_slimmed takes a Trainer or a PreTrainedModel, got Linear, which holds no PreTrainedModel that it could",
    ),
    "save: a name": (lambda tmp: save_slimmed("bert", tmp / "slim"), ValueError, "takes a Trainer .* got str"),
    "save: no model": (lambda tmp: save_slimmed(None, tmp / "slim"), ValueError, "takes a Trainer .* got NoneType"),
    "save: a file": (save_over_a_file, NotADirectoryError, "slim' is a file; name a folder"),
    "save: an empty path": (
        lambda _: save_slimmed(masked(), ""),
        ValueError,
        "output_dir must be the path of a folder, got ''",
    ),
    "save: no path": (lambda _: save_slimmed(masked(), None), ValueError, "output_dir must be the path .* got None"),
    "save: a path of bytes": (
        lambda _: save_slimmed(masked(), b"out"),
        ValueError,
        "output_dir must be .* got b'out'",
    ),
    "save: a number to verify": (
        lambda tmp: save(tmp, verify=1e-4),
        ValueError,
        r"verify must be True, False or a batch \(a dict of the model's inputs\), got 0.0001",
    ),
    "save: nothing to verify": (lambda tmp: save(tmp, verify=None), ValueError, "verify must be True, .* got None"),
    "save: an empty batch": (lambda tmp: save(tmp, verify={}), ValueError, "verify must be True, .* got {}"),
    "save: a list to verify": (
        lambda tmp: save(tmp, verify=[torch.ones(1, 4)]),
        ValueError,
        r"verify must be True, .* got \[tensor",
    ),
    "save: a batch without names": (
        lambda tmp: save(tmp, verify={0: torch.ones(1, 4)}),
        ValueError,
        r"verify: the inputs of a batch are named by strings, got \[0\]",
    ),
    "save: a batch of another model": (
        lambda tmp: save(tmp, verify={"pixel_values": torch.ones(1, 3, 8, 8)}),
        ValueError,
        r"BertForSequenceClassification cannot run on pixel_values \(1, 3, 8, 8\): .* Pass a batch of yours",
    ),
    "save: a batch of tokens that do not exist": (
        lambda tmp: save(tmp, verify={"input_ids": torch.tensor([[5, 99]])}),
        ValueError,
        r"cannot run on input_ids \(1, 2\): index out of range",
    ),
    "save: a diverged model": (save_nan, VerificationError, "loss holds NaN or .* the training has diverged"),
    "save: Hub keywords without a push": (
        lambda tmp: save(tmp, private=True, token="x"),
        ValueError,
        "private, token can only be used with push_to_hub=True",
    ),
    "save: an unknown keyword": (
        lambda tmp: save(tmp, push_to_hub=True, colour=1),
        TypeError,
        "unexpected keyword argument 'colour'; for the Hub it takes token, private",
    ),
    "save: a name for push_to_hub": (
        lambda tmp: save(tmp, push_to_hub="me/slim"),
        ValueError,
        "push_to_hub must be True or False, got 'me/slim'",
    ),
    "save: a path for inplace": (lambda tmp: save(tmp, inplace="out"), ValueError, "inplace must be True or False"),
    "save: a number for repo_id": (lambda tmp: save(tmp, repo_id=3), ValueError, "repo_id must be the name of a repo"),
    "save: a repo_id that no Hub has": (
        lambda tmp: save(tmp, repo_id="my slim model", push_to_hub=True),
        HFValidationError,
        "'my slim model'",
    ),
    "save: a name for the tokenizer": (
        lambda tmp: save(tmp, processing_class="bert-base-uncased"),
        ValueError,
        "processing_class must be a tokenizer or processor, which have save_pretrained, got str",
    ),
    # Shape records.
    "record: no version": (
        lambda _: from_record({"shapes": {}}),
        ValueError,
        "The shape record in the config is damaged: its version is None",
    ),
    "record: a version of text": (
        lambda _: from_record(shapes(version="1")),
        ValueError,
        "is damaged: its version is '1'",
    ),
    "record: a newer version": (
        lambda _: from_record(shapes(version=2)),
        ValueError,
        "is of version 2, but this hf_slim reads up to 1: upgrade it",
    ),
    "record: no shapes": (lambda _: from_record({"version": 1}), ValueError, "is damaged: its shapes are None"),
    "record: a list of shapes": (
        lambda _: from_record(shapes(shapes=[[8]])),
        ValueError,
        r"is damaged: its shapes are \[\[8\]\]",
    ),
    "record: a negative size": (
        lambda _: from_record(shapes(shape=[32, -8])),
        ValueError,
        r"is damaged: it gives encoder.layer.1.output.dense.weight the shape \[32, -8\]",
    ),
    "record: a fraction": (
        lambda _: from_record(shapes(shape=[32, 8.0])),
        ValueError,
        r"is damaged: it gives encoder.layer.1.output.dense.weight the shape \[32, 8.0\]",
    ),
    "record: more than there is": (
        lambda _: from_record(shapes(shape=[32, 65])),
        ValueError,
        r"does not fit: it gives Linear.weight the shape \(32, 65\), but the other fields make it \(32, 64\)",
    ),
    "record: an unknown layer": (
        lambda _: from_record(shapes("encoder.layer.7.output.dense.weight")),
        ValueError,
        "names what BertModel does not have: encoder.layer.7.output.dense",
    ),
    "record: an unknown module": (
        lambda _: from_record(shapes("elsewhere.weight")),
        ValueError,
        "names what BertModel does not have: elsewhere. The config belongs to another model",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS)
def test_calls(call, error, message, tmp_path: Path):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        call(tmp_path)
    assert type(caught.value) is error
    assert not (tmp_path / "slim").is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["walk"], "No such command 'walk'. See `hf-slim --help`."),
        ([*RUN, "--slim_scope", "layer"], "argument --slim_scope.*: invalid choice: 'layer'"),
        ([*RUN, "--ffn2_sparsity", "half"], "argument --ffn2_sparsity.*: invalid float value"),
        ([*RUN, "--slim_round_to", "8.5"], "argument --slim_round_to.*: invalid int value"),
        ([*RUN, "--slim_start", "inf"], "slim_start must be a step"),
        ([*RUN, "--ffn2_sparsity", "50"], "ffn2_sparsity must be in"),
        ([*RUN, "--slim_exclude", "(x"], ".*is neither a shell-style"),
        (
            [*RUN, "--max_steps", "4", "--mha_sparsity", "0.5", "--slim_end", "9"],
            "slim_end=9 is beyond the last training step, 4",
        ),
    ],
)
def test_flags(flags, message):
    assert re.match(message, refuse(*flags))
