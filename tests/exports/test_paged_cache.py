"""Continuous batching is refused where its cache would not fit the layers."""

import pytest
from conftest import build, half_masks
from tiny import build_tiny

from hf_slim import find_structures, model_slim
from hf_slim.compaction.zeros import zero_units
from hf_slim.exports import refuse_other_groups


def slim(family, keep):
    """A slim model; `keep` says how many units of which structure are kept."""
    model = build(family)
    structures = find_structures(model).structures
    zero_units(model, structures, half_masks(structures, keep=keep))
    return model_slim(model, 1)


def uneven(structure):
    return structure.units // 2 - ("1" in structure.name)


def even(structure):
    return structure.units // 2


def channels_alone(structure):
    return structure.units if structure.kind == "mha" else uneven(structure)


def test_generate_batch_is_refused_where_it_answered_with_empty_texts():
    with pytest.raises(ValueError, match=r"keeps 4 key-value heads .* but model\.layers\.0\.self_attn\.o_proj has 2"):
        slim("llama", uneven).generate_batch([[5, 6, 7]])


@pytest.mark.parametrize(
    ("family", "keep"), [("llama", even), ("llama", channels_alone), ("gpt2", channels_alone), ("opt", channels_alone)]
)
def test_models_whose_config_says_the_number_are_not(family, keep):
    refuse_other_groups(slim(family, keep))
    refuse_other_groups(build(family))


def test_a_tower_that_reads_pictures_has_no_cache():
    model = build_tiny("llava", "AutoModelForImageTextToText")
    structures = find_structures(model).structures
    tower = [s for s in structures if "vision" in s.name]
    zero_units(model, tower, half_masks(tower, keep=lambda s: 1))
    refuse_other_groups(model_slim(model, 1))


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_a_number_that_all_layers_have_but_the_config_does_not_say_is_refused(family):
    with pytest.raises(ValueError, match=r"keeps 4 key-value heads .* has 2.* Use generate\(\) instead"):
        refuse_other_groups(slim(family, even))
