"""From the training step to the sparsity."""

import pytest

from hf_slim import SlimConfig
from hf_slim.arguments import place_steps
from hf_slim.training.schedule import Schedule, sparsity_at_event

SETTINGS = {"start": 0.1, "end": 0.5, "frequency": 10, "schedule": "exp"}


def steps(**changes):
    return place_steps(SlimConfig(**{f"slim_{name}": value for name, value in {**SETTINGS, **changes}.items()}), 100)


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
    assert steps() == (10, 20, 30, 40, 50)
    assert steps(frequency=15) == (10, 25, 40, 50)
    assert steps(start=7, end=9, frequency=0.001) == (7, 8, 9)
    assert steps(start=0, end=0) == (1,)
    assert steps(schedule="oneshot") == (10,)


def test_sparsity_holds_between_events():
    schedule = Schedule(steps(), 0.8, "linear")
    assert [schedule.sparsity_at(step) for step in (0, 9, 10, 19, 20, 50, 99)] == pytest.approx(
        [0, 0, 0.16, 0.16, 0.32, 0.8, 0.8]
    )


def test_end_beyond_training_is_refused():
    with pytest.raises(ValueError, match="slim_end=101 is beyond the last training step, 100"):
        steps(end=101)


def test_start_after_end_is_refused():
    with pytest.raises(ValueError, match="slim_start=60 is step 60 of 100, after slim_end=0.5, which is step 50"):
        steps(start=60)
