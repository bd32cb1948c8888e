"""Odd modules are never silently wrong, on any route on which units leave a model: proof stands behind discovery."""

import pytest
from odd_modules import ODD
from odd_routes import ON_MODULES, ROUTES, verdict_of

CASES = [(route, True) for route in ROUTES] + [(route, False) for route in ON_MODULES]


@pytest.mark.parametrize(("route", "pretrained"), CASES)
def test_no_odd_module_is_taken(route, pretrained):
    found = {verdict_of(name, route, pretrained=pretrained, is_blind=False) for name in list(ODD)[::6]}
    assert found == {"skipped"}


@pytest.mark.parametrize(("route", "pretrained"), CASES)
@pytest.mark.parametrize("part", range(4))
def test_what_discovery_would_take_is_refused_by_proof(route, pretrained, part):
    found = {name: verdict_of(name, route, pretrained=pretrained, is_blind=True) for name in list(ODD)[part::4]}
    assert "WRONG" not in found.values(), found
    if route == "model_slim" and not pretrained:  # nothing to make inputs from: one warning says so
        assert "warned of" in found.values()
    else:
        assert "warned of" not in found.values(), found
        assert {"refused", "kept as zeros"} & set(found.values())
