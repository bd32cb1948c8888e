"""Alternating rounds."""

import pytest
import torch
from transformers.utils import logging

from hf_slim.costs.timing import time_alternately, time_call, without_bars

CPU = torch.device("cpu")


def test_calls_alternate_and_the_first_rounds_do_not_count() -> None:
    calls: list[str] = []
    times = time_alternately(
        {name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3, device=CPU, desc="Two", warm_up=2
    )
    assert calls == ["a", "b"] * (2 + 3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert all(second > 0 for seconds in times.values() for second in seconds)


def test_a_call_is_timed_once() -> None:
    calls: list[int] = []
    assert time_call(lambda: calls.append(1), CPU) > 0
    assert calls == [1]


def test_bars_come_back_after_an_error() -> None:
    assert logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError, match="on purpose"), without_bars():
        assert not logging.is_progress_bar_enabled()
        raise RuntimeError("on purpose")
    assert logging.is_progress_bar_enabled()
