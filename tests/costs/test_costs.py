"""Curves of costs, what they add up to, and the line of a report."""

import pytest

from hf_slim.costs.costs import BudgetReport, Costs, Curve


def test_a_curve_is_straight_between_its_points_and_beyond():
    curve = Curve.through({8: 10.0, 2: 4.0, 4: 6.0})
    assert (curve.units, curve.costs) == ((2, 4, 8), (4.0, 6.0, 10.0))
    assert [curve.at(units) for units in (0, 2, 3, 4, 6, 8)] == [2.0, 4.0, 5.0, 6.0, 8.0, 10.0]
    assert curve.scale(2).at(6) == 16.0


def test_more_units_never_cost_less():
    assert Curve.through({1: -3.0, 2: -5.0, 4: 0.0}).costs == (-3.0, -3.0, 0.0)


def test_a_total_is_the_dense_cost_less_what_every_structure_has_lost():
    costs = Costs("FLOPs", 100.0, {"a": Curve((0, 10), (0.0, 20.0)), "b": Curve((0, 4), (0.0, 40.0))})
    assert (costs.total({}), costs.total({"a": 5}), costs.find({"a": 5, "b": 1})) == (100.0, 90.0, 60.0)
    measured = Costs("ms", 100.0, costs.curves, lambda kept: 7.0)
    assert (measured.total({"a": 5}), measured.find({"a": 5})) == (90.0, 7.0)


@pytest.mark.parametrize(
    ("unit", "line"),
    [
        ("parameters", "500 parameters asked (50.0%), 499 got (49.9%) of 1,000 before"),
        ("ms", "500.000 ms asked (50.0%), 499.000 got (49.9%) of 1,000.000 before"),
    ],
)
def test_a_report_is_one_line(unit, line):
    assert str(BudgetReport(unit, 1000.0, 500.0, 499.0)) == line
