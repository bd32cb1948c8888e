"""Odd modules are never silently wrong, on any route on which units leave a model: proof stands behind discovery."""

import pytest
from odd_modules import ODD
from odd_routes import ON_MODULES, ROUTES, verdict_of

CASES = [(route, True) for route in ROUTES] + [(route, False) for route in ON_MODULES]
PARTS = 8
TRAINED = [route for route in ROUTES if route not in ON_MODULES]
"""Routes that train every module; each takes another part of them, and all of them where slow tests run."""


def is_slow(route: str, pretrained: bool, part: int) -> bool:
    """Whether a part is tried where slow tests run only; each module gets a batch in one of two models."""
    if route in TRAINED:
        return TRAINED.index(route) != part
    return route == "model_slim, batch" and part % 2 == pretrained


@pytest.mark.parametrize(("route", "pretrained"), CASES)
def test_no_odd_module_is_taken(route, pretrained):
    found = {verdict_of(name, route, pretrained=pretrained, is_blind=False) for name in list(ODD)[::6]}
    assert found == {"skipped"}


@pytest.mark.parametrize(
    ("route", "pretrained", "part"),
    [
        pytest.param(*case, part, marks=[pytest.mark.slow] * is_slow(*case, part))
        for case in CASES
        for part in range(PARTS)
    ],
)
def test_what_discovery_would_take_is_refused_by_proof(route, pretrained, part):
    found = {name: verdict_of(name, route, pretrained=pretrained, is_blind=True) for name in list(ODD)[part::PARTS]}
    assert "WRONG" not in found.values(), found
    if route == "model_slim" and not pretrained:  # nothing to make inputs from: one warning says so
        assert "warned of" in found.values()
    else:
        assert "warned of" not in found.values(), found
        assert {"refused", "kept as zeros"} & set(found.values())
