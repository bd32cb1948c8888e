"""What names may mean."""

import math

import torch

from hf_slim.structures.custom_code.axes import Many, Plain, Size, Star, Units
from hf_slim.structures.custom_code.values import Bound, Child, Conflict, Known, is_tainted, merge, wrap


def test_objects_of_python():
    assert [wrap(value) for value in (None, 3, "a")] == [Plain(None), Plain(3), Plain("a")]
    assert [wrap(value) for value in (math.sqrt, torch)] == [Known(math.sqrt), Known(torch)]
    assert wrap(torch.ones(2)) == Plain()


def test_what_depends_on_units():
    tainted = [Units(-1), Size(), Conflict(), (Plain(), [Units(-1)]), Many(Size()), Star(Units(-1))]
    assert all(is_tainted([value]) for value in tainted)
    assert not is_tainted([Plain(), Child("a"), Known(len), (Plain(),), Many(Plain()), Star()])


def test_what_two_branches_have_in_common():
    units, known = Units(-1, 3), Known(len)
    assert merge(units, units) == units
    assert merge(units, Units(-1, 4)) == Units(-1, None)
    assert merge(units, Units(-2, 3)) == merge(units, Size()) == merge(units, known) == Conflict()
    assert merge(Plain(1), Plain(2)) == Plain()
    assert merge(Plain(1), units) == merge(units, Plain(1)) == units
    assert merge(known, Child("a")) == known
    assert merge((units, Plain(1)), (Plain(1), Plain(1))) == (units, Plain(1))
    assert merge((units,), (units, units)) == merge(Child("a"), Bound(Child("a"), "b")) == Conflict()
