"""From the training step to the sparsity."""

import pytest

from hf_slim.schedule import make_schedule, sparsity_at_event

SETTINGS = {"start": 0.1, "end": 0.5, "frequency": 10, "curve": "exp", "target": 0.8, "max_steps": 100}


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("linear", [0.0, 0.2, 0.4, 0.6, 0.8]),
        ("exp", [0.0, 1 - 0.2**0.25, 1 - 0.2**0.5, 1 - 0.2**0.75, 0.8]),
        ("cubic", [0.0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8]),
        ("cos", [0.0, 0.4 * (1 - 0.5**0.5), 0.4, 0.4 * (1 + 0.5**0.5), 0.8]),
        ("oneshot", [0.0, 0.8, 0.8, 0.8, 0.8]),
    ],
)
def test_curves(curve, expected):
    assert [sparsity_at_event(curve, i, 4, 0.8) for i in range(5)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("curve", ["exp", "cubic", "cos", "linear", "oneshot"])
@pytest.mark.parametrize("events", [1, 2, 3, 7, 100])
def test_the_last_event_reaches_the_target_exactly(curve, events):
    assert sparsity_at_event(curve, events, events, 0.8) == 0.8


def test_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="slim_schedule must be one of"):
        sparsity_at_event("quick", 1, 2, 0.8)


def test_steps_and_fractions():
    assert make_schedule(**SETTINGS).steps == (10, 20, 30, 40, 50)
    assert make_schedule(**{**SETTINGS, "frequency": 15}).steps == (10, 25, 40, 50)
    assert make_schedule(**{**SETTINGS, "start": 7, "end": 9, "frequency": 0.001}).steps == (7, 8, 9)
    assert make_schedule(**{**SETTINGS, "start": 0, "end": 0}).steps == (1,)
    assert make_schedule(**{**SETTINGS, "curve": "oneshot"}).steps == (10,)


def test_sparsity_holds_between_events():
    schedule = make_schedule(**{**SETTINGS, "curve": "linear"})
    assert [schedule.sparsity_at(step) for step in (0, 9, 10, 19, 20, 50, 99)] == pytest.approx(
        [0, 0, 0.16, 0.16, 0.32, 0.8, 0.8]
    )


def test_end_beyond_training_is_refused():
    with pytest.raises(ValueError, match="slim_end=101 is beyond the last training step, 100"):
        make_schedule(**{**SETTINGS, "end": 101})


def test_start_after_end_is_refused():
    with pytest.raises(ValueError, match="slim_start=60 is step 60 of 100, after slim_end=0.5, which is step 50"):
        make_schedule(**{**SETTINGS, "start": 60})
