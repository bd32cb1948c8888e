"""Which units are kept: scope, floors, rounding, and what has been dropped before."""

import pytest
import torch

from hf_slim.structures.structure import Structure
from hf_slim.training.unit_selection import check_reachable, select_units

SETTINGS = {"scope": "local", "round_to": 1, "min_heads": 1}


def make(kind, *units):
    structures = [Structure(f"{kind}{n}", kind, size, ()) for n, size in enumerate(units)]
    return structures, {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}


def choose(structures, scores, masks, sparsity, **settings):
    named = {s.name: torch.tensor(values, dtype=torch.float32) for s, values in zip(structures, scores, strict=True)}
    chosen = select_units(structures, named, masks, sparsity, **{**SETTINGS, **settings})
    return [chosen[s.name].int().tolist() for s in structures]


def test_local_drops_the_lowest_of_each():
    structures, masks = make("mha", 4, 4)
    kept = choose(structures, [[1, 2, 3, 4], [40, 30, 20, 10]], masks, 0.5)
    assert kept == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_global_drops_the_lowest_of_all_but_the_floor():
    structures, masks = make("mha", 4, 4)
    scores = [[1, 2, 3, 4], [40, 30, 20, 10]]
    assert choose(structures, scores, masks, 0.5, scope="global") == [[0, 0, 0, 1], [1, 1, 1, 0]]
    assert choose(structures, scores, masks, 0.5, scope="global", min_heads=2) == [[0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("units", "sparsity", "kept"),
    [(12, 0.6, 5), (10, 0.6, 4), (100, 0.29, 71), (3, 0.3, 3), (10, 0.7, 3), (5, 0.9, 1)],
)
def test_number_of_heads(units, sparsity, kept):
    structures, masks = make("mha", units)
    assert sum(choose(structures, [range(units)], masks, sparsity)[0]) == kept


@pytest.mark.parametrize(
    ("units", "sparsity", "round_to", "kept"),
    [
        (1536, 0.8, 32, 320),
        (3072, 0.8, 32, 640),
        (100, 0.5, 32, 64),
        (100, 0.1, 32, 96),
        (100, 0.03, 32, 100),
        (64, 0.5, 1, 32),
    ],
)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_channels_round_up(units, sparsity, round_to, kept, scope):
    structures, masks = make("ffn", units)
    assert sum(choose(structures, [range(units)], masks, sparsity, round_to=round_to, scope=scope)[0]) == kept


def test_global_rounding_keeps_the_total():
    structures, masks = make("ffn", 64, 64)
    scores = [list(range(64)), [value + 0.5 for value in range(64)]]
    kept = choose(structures, scores, masks, 0.5, round_to=16, scope="global")
    assert [sum(mask) for mask in kept] == [32, 32]
    scores[1] = [value + 1000 for value in range(64)]
    kept = choose(structures, scores, masks, 0.5, round_to=16, scope="global")
    assert [sum(mask) for mask in kept] == [16, 48]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_dropped_units_stay_dropped(scope):
    structures, masks = make("ffn", 8, 8)
    masks["ffn0"][:2] = False
    masks["ffn1"][:2] = False
    kept = choose(structures, [[9, 9, 6, 5, 4, 3, 2, 1]] * 2, masks, 0.5, scope=scope)
    assert kept == [[0, 0, 1, 1, 1, 1, 0, 0]] * 2
    assert choose(structures, [[9] * 8] * 2, masks, 0.0, scope=scope) == [[0, 0, 1, 1, 1, 1, 1, 1]] * 2


def test_no_more_is_dropped_than_asked_for():
    """Of a block of channels most of which are gone only the others count."""
    structures, masks = make("ffn", 8, 8)
    masks["ffn0"][:3] = False
    kept = choose(structures, [[0, 0, 0, 50, 60, 70, 80, 90], range(8)], masks, 0.25, round_to=4, scope="global")
    assert kept == [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]


@pytest.mark.parametrize(
    ("kind", "units", "sparsity", "settings", "message"),
    [
        (
            "ffn",
            (64,),
            0.8,
            {"round_to": 32},
            "ffn2_sparsity=0.8 is unreachable: of the 64 units of ffn0, slim_round_to=32 .* 0.5",
        ),
        ("mha", (4,), 0.75, {"min_heads": 2}, "mha_sparsity=0.75 is unreachable: .* slim_min_heads=2 .* so 0.5 is"),
        ("mha", (1,), 0.5, {}, "mha_sparsity=0.5 is unreachable: of the 1 units of mha0, .* so 0 is the most"),
        (
            "ffn",
            (64, 32),
            0.7,
            {"round_to": 32, "scope": "global"},
            "of the 96 units of 2 structures, .* so 0.3333 is",
        ),
    ],
)
def test_unreachable_sparsity_is_refused(kind, units, sparsity, settings, message):
    structures, _ = make(kind, *units)
    with pytest.raises(ValueError, match=message):
        check_reachable(structures, sparsity, **{**SETTINGS, **settings})
