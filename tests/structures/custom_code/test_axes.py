"""Where units lie after an operation."""

import pytest

from hf_slim.structures.custom_code import axes
from hf_slim.structures.custom_code.axes import UNKNOWN, Plain, Size, Units, UnreadableError

HEADS = {8}
LAST, SECOND, THIRD = Units(-1, 3), Units(-2, 4), Units(-3, 4)
ALL = slice(None)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: axes.align([LAST, Plain(), Units(-1, 2)]), LAST),
        (lambda: axes.align([Size(), Plain()]), Size()),
        (lambda: axes.combine([LAST, Plain(2)]), LAST),
        (lambda: axes.reduce(SECOND, [-1], keep=False), Units(-1, 3)),
        (lambda: axes.reduce(SECOND, [0], keep=False), Units(-2, 3)),
        (lambda: axes.reduce(SECOND, [-1], keep=True), SECOND),
        (lambda: axes.permute(SECOND, [0, 2, 1, 3]), THIRD),
        (lambda: axes.swap(SECOND, 1, 2), THIRD),
        (lambda: axes.swap(LAST, 0, 1), LAST),
        (lambda: axes.insert(LAST, -1), Units(-2, 4)),
        (lambda: axes.insert(LAST, 0), Units(-1, 4)),
        (lambda: axes.multiply(THIRD, Units(-3, 4)), THIRD),
        (lambda: axes.multiply(SECOND, Plain()), SECOND),
        (lambda: axes.reshape(LAST, [Plain(), Plain(), Size(), Plain(8)], HEADS), SECOND),
        (lambda: axes.reshape(LAST, [Plain(), Plain(), Plain(-1), Plain(8)], HEADS), SECOND),
        (lambda: axes.reshape(SECOND, [Plain(), Plain(), Plain(-1)], HEADS), LAST),
        (lambda: axes.reshape(Units(-1, 3, 3), [Plain(), Plain(), Plain(3), Size(), Plain(8)], HEADS), Units(-2, 5)),
        (lambda: axes.flatten(SECOND, -2), LAST),
        (lambda: axes.glu(Units(-1, 3, 2)), LAST),
        (lambda: axes.take(LAST, [ALL, Plain(0)]), Units(-1, 2)),
        (lambda: axes.take(LAST, [Ellipsis, None]), Units(-2, 4)),
        (lambda: axes.take(Units(-1), [Ellipsis, None]), Units(-2)),
        (lambda: axes.take(Units(-2), [Ellipsis, Plain(0)]), Units(-1)),
        (lambda: axes.take(SECOND, [Ellipsis, slice(0, 1, False)]), SECOND),
    ],
)
def test_units_stay_by_themselves(call, expected):
    assert call() == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: axes.align([LAST, Units(-2, 3)]), "combines tensors in which units lie along different dimensions"),
        (lambda: axes.align([LAST, Size()]), "calculates with a number that depends on how many units there are"),
        (lambda: axes.combine([LAST, Plain(UNKNOWN)]), "combines units with a tensor that may have a value for each"),
        (lambda: axes.reduce(LAST, [-1], keep=False), "goes over the dimension along which the units lie"),
        (lambda: axes.reduce(Units(-1), [1], keep=True), "counts dimension 1 from the front of a tensor of which"),
        (lambda: axes.multiply(LAST, Plain()), "multiplies matrices along whose rows or columns the units lie"),
        (lambda: axes.reshape(LAST, [Plain(), Plain(4), Plain(-1)], HEADS), "splits the units' values into groups"),
        (
            lambda: axes.reshape(LAST, [Plain(), Plain(), Size(), Plain(7)], HEADS),
            "otherwise than into .*heads, width",
        ),
        (lambda: axes.reshape(Units(-1, 3, 3), [Plain(-1)], HEADS), "while they are one tensor"),
        (lambda: axes.flatten(LAST, 1), "joins the units with what lies before them"),
        (lambda: axes.glu(LAST), "multiplies one half of the units by the other"),
        (lambda: axes.take(LAST, [Ellipsis, Plain(0)]), "takes some of the units"),
        (lambda: axes.take(LAST, [Size()]), "takes a part that depends on units"),
        (lambda: axes.take(Units(-1), [Plain(0)]), "takes a part of a tensor of which the rank is not known"),
    ],
)
def test_what_may_mix_units_is_refused(call, reason):
    with pytest.raises(UnreadableError, match=reason):
        call()
