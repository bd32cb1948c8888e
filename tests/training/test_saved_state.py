"""What a checkpoint holds of a slimming run: whether it is as it was written, and of the same settings."""

import pytest
import torch

from hf_slim import SlimConfig
from hf_slim.training.plan import to_state
from hf_slim.training.saved_state import check_saved, read_masks, refuse_other_settings

SAVED = {
    "settings": {},
    "steps": [[1, 2]],
    "events": [1],
    "live": False,
    "dropped": {"a": [1]},
    "scores": {"a": [0.5]},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "it has no steps"),
        ({"live": 1}, "it has no live"),
        ({"steps": [[]]}, "its steps are not lists of numbers"),
        ({"events": [True]}, "its events are not numbers"),
        ({"scores": {"a": ["x"]}}, "its scores are not numbers"),
        ({"dropped": {"a": 1}}, "its dropped units or scores are not lists"),
        ({"zeros": []}, "its zeros or unproven structures are not as they were written"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(changes, message):
    check_saved(SAVED)
    with pytest.raises(ValueError, match=f"does not fit or is damaged: {message}. Resume from another checkpoint"):
        check_saved({**SAVED, **changes})


def test_masks_are_read():
    masks = {"a": torch.ones(4, dtype=torch.bool)}
    assert {name: mask.tolist() for name, mask in read_masks({"a": [1, 3]}, masks).items()} == {
        "a": [True, False, True, False]
    }
    with pytest.raises(ValueError, match="'b' is in only one of the state and the model"):
        read_masks({"b": []}, masks)
    with pytest.raises(ValueError, match="the dropped units of a are not among its 4 units"):
        read_masks({"a": [4]}, masks)


def test_other_settings_are_named():
    saved = {**SAVED, "settings": to_state(SlimConfig(ffn2_sparsity=0.5))}
    refuse_other_settings(saved, SlimConfig(ffn2_sparsity=0.5))
    with pytest.raises(ValueError, match="other slim settings: ffn2_sparsity=0.5 there, 0.6 here. Resume with"):
        refuse_other_settings(saved, SlimConfig(ffn2_sparsity=0.6))
