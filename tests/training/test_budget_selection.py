"""Which units go for a budget: by what they are worth over what they cost, down to the floors, and near the budget."""

import torch

from hf_slim.costs import Costs
from hf_slim.costs.costs import Curve
from hf_slim.structures.structure import Member, Structure, blocks
from hf_slim.training.budget_selection import find_floors, select_within


def make(name, kind, units, multiple=1):
    return Structure(name, kind, units, (Member(f"{name}.weight", 1, blocks(units, 1), "output"),), multiple=multiple)


def whole(structures):
    return {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures}


def select(structures, scores, costs, allowed, masks=None, round_to=1, min_heads=1):
    scores = {name: torch.tensor(values) for name, values in scores.items()}
    masks = masks or whole(structures)
    chosen = select_within(structures, scores, masks, costs, allowed, round_to=round_to, min_heads=min_heads)
    return {name: mask.nonzero().flatten().tolist() for name, mask in chosen.items()}


def straight(structures, prices, rest=0.0):
    curves = {s.name: Curve((0, s.units), (0.0, float(prices[s.name] * s.units))) for s in structures}
    return Costs("parameters", rest + sum(curve.costs[-1] for curve in curves.values()), curves)


def test_what_is_worth_least_for_its_cost_goes_whatever_its_kind():
    heads, channels = make("mha", "mha", 3), make("ffn", "ffn", 4)
    costs = straight([heads, channels], {"mha": 10, "ffn": 1}, rest=6)  # 40 in all
    scores = {"mha": [30.0, 5.0, 20.0], "ffn": [1.0, 4.0, 0.2, 3.0]}
    # Worth over cost: heads 3, 0.5, 2; channels 1, 4, 0.2, 3.
    assert select([heads, channels], scores, costs, 39) == {"mha": [0, 1, 2], "ffn": [0, 1, 3]}
    assert select([heads, channels], scores, costs, 30) == {"mha": [0, 2], "ffn": [0, 1, 2, 3]}
    assert select([heads, channels], scores, costs, 29) == {"mha": [0, 2], "ffn": [0, 1, 3]}
    assert select([heads, channels], scores, costs, 18) == {"mha": [0], "ffn": [1, 3]}


def test_channels_go_in_blocks_and_floors_hold():
    heads, channels = make("mha", "mha", 4), make("ffn", "ffn", 40)
    assert find_floors([heads, channels], round_to=4, min_heads=2) == {"mha": 2, "ffn": 4}
    assert find_floors([heads, channels], round_to=1, min_heads=1) == {"mha": 1, "ffn": 2}  # a twentieth is left
    assert find_floors([make("f", "ffn", 100, multiple=16)], round_to=1, min_heads=1) == {"f": 16}
    costs = straight([heads, channels], {"mha": 10, "ffn": 1})
    scores = {"mha": [1.0, 2.0, 3.0, 4.0], "ffn": [float(number) for number in range(40)]}
    chosen = select([heads, channels], scores, costs, 0, round_to=4, min_heads=2)
    assert chosen == {"mha": [2, 3], "ffn": [36, 37, 38, 39]}
    assert len(select([heads, channels], scores, costs, 70, round_to=16)["ffn"]) in (16, 32, 40)


def test_what_is_dropped_stays_dropped():
    heads, channels = make("mha", "mha", 3), make("ffn", "ffn", 4)
    costs = straight([heads, channels], {"mha": 10, "ffn": 1})
    masks = {"mha": torch.tensor([True, True, False]), "ffn": torch.tensor([True, False, True, True])}
    scores = {"mha": [1.0, 2.0, 99.0], "ffn": [1.0, 99.0, 2.0, 3.0]}
    assert select([heads, channels], scores, costs, 34, masks) == {"mha": [0, 1], "ffn": [0, 2, 3]}
    assert select([heads, channels], scores, costs, 13, masks) == {"mha": [1], "ffn": [0, 2, 3]}


def test_blocks_that_save_nothing_alone_go_with_the_next():
    """A layer that is as slow with three units as with four, and twice as fast with two."""
    steps, plain = make("a", "ffn", 4), make("b", "ffn", 4)
    costs = Costs("ms", 20.0, {"a": Curve((1, 2, 3, 4), (4.0, 5.0, 9.0, 9.0)), "b": Curve((0, 4), (0.0, 4.0))})
    scores = {"a": [0.1, 0.1, 5.0, 5.0], "b": [3.0, 3.0, 3.0, 3.0]}
    assert select([steps, plain], scores, costs, 16) == {"a": [2, 3], "b": [0, 1, 2, 3]}
    assert select([steps, plain], scores, costs, 20) == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


def test_what_fits_comes_back():
    """A head of 10 has to go for 3 that are too much; 7 of them are then free for channels that had gone before."""
    heads, channels = make("mha", "mha", 2), make("ffn", "ffn", 8)
    costs = straight([heads, channels], {"mha": 10, "ffn": 1})  # 28 in all
    scores = {"mha": [8.0, 20.0], "ffn": [0.5] * 4 + [9.0] * 4}
    # Four channels go first (0.5 each for a cost of 1), then the worse head (0.8): 14. Four of 0.5 fit into 18.
    assert select([heads, channels], scores, costs, 18) == {"mha": [1], "ffn": list(range(8))}
    assert select([heads, channels], scores, costs, 16) == {"mha": [1], "ffn": [0, 1, 4, 5, 6, 7]}


def test_blocks_are_exchanged_where_much_stays_unused():
    big, small = make("a", "mha", 2), make("b", "mha", 3)
    costs = straight([big, small], {"a": 10, "b": 7}, rest=0)  # 41 in all
    scores = {"a": [10.0, 50.0], "b": [8.0, 9.0, 50.0]}
    # The worse one of a goes first (1.0 for its cost against 1.14): 31 of 34. With one of b in its place: 34.
    assert select([big, small], scores, costs, 34) == {"a": [0, 1], "b": [1, 2]}


def test_a_head_comes_back_for_channels_even_where_other_heads_are_worth_less():
    structures = [make("first", "mha", 4), make("second", "mha", 4), make("ffn", "ffn", 60)]
    costs = straight(structures, {"first": 10, "second": 10, "ffn": 1})  # 140 in all
    scores = {"first": [0.1, 0.2, 0.3, 0.4], "second": [0.1, 0.2, 0.3, 0.4], "ffn": [float(50 + n) for n in range(60)]}
    chosen = select(structures, scores, costs, 119)  # the two cheapest heads leave 120, three leave 110
    assert {name: len(units) for name, units in chosen.items()} == {"first": 3, "second": 3, "ffn": 59}
    assert chosen["ffn"][0] == 1
