"""Timing several things alternately, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

Clock = Callable[[], float]

_LONG = 5.0  # seconds from which a progress bar is shown


def time_alternately(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    device: torch.device,
    desc: str,
    warm_up: int = 3,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several calls in rounds, each once a round and always in the same order.

    Args:
        calls: What to time, by name.
        repeats: Timed rounds.
        device: Where the calls compute; they are waited for.
        desc: What the progress bar says, which is shown where the rounds take long.
        warm_up: Rounds before, which are not counted.
        clock: What gives the time, in seconds.

    Returns:
        For each name the seconds of every round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    round_time = 0.0
    for _ in range(warm_up):
        round_time = sum(time_call(call, device) for call in calls.values())
    for _ in logging.tqdm(range(repeats), desc=desc, leave=False, disable=round_time * repeats < _LONG):
        for name, call in calls.items():
            times[name].append(time_call(call, device, clock))
    return times


def time_call(call: Callable[[], Any], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Time one call.

    Args:
        call: What to time.
        device: Where it computes; it is waited for.
        clock: What gives the time, in seconds.

    Returns:
        Seconds.
    """
    _wait_for(device)
    start = clock()
    call()
    _wait_for(device)
    return clock() - start


def choose_clock(device: torch.device) -> Clock:
    """The clock that a busy machine disturbs least.

    Args:
        device: Where models compute.

    Returns:
        That of the thread where a single one computes, which stands still while others have its core; else that of
        the wall.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@contextmanager
def without_bars() -> Iterator[None]:
    """Have transformers show no progress bars, since each file that is saved or loaded has one."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
