"""What a slim model costs and saves outside training: inference, and parsing, scoring, compacting, saving, loading."""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..costs import time_alternately, time_call, without_bars
from ..parallel import find_shards
from ..saving import measure_latency, save_slimmed
from ..structures import find_structures, get_tensor
from ..training import score_structures
from .memory import read_weights, run_fresh
from .shapes import Case, build_meta

_COMPACTIONS = 3
"""Timed at most, since each needs a fresh masked model."""


def measure_inference(case: Case) -> Iterator[dict[str, Any]]:
    """Time a forward pass of the dense, the slim and a stock model, alternately.

    The stock model is built from the slim model's config alone. Where the config cannot express the shape by its own
    fields, the config holds the shape record, and the stock model is a fresh one of that shape.

    Args:
        case: The case, with the size of its batches.

    Yields:
        One record: median milliseconds of each, operations by count, and the fraction that is reached of the speed-up
        that the operations give.
    """
    models = {"dense": case.build(), "slim": case.build_slim(), "stock": case.build(case.slim_config)}
    ms = measure_latency(models, {"input_ids": case.make_batch()["input_ids"]}, repeats=case.arguments.repeats)
    flops, slim_flops = case.count_flops(), case.count_flops(slim=True)
    speed_up = ms["dense"] / ms["slim"]
    yield {
        **case.to_record(),
        **{f"{name}_ms": value for name, value in ms.items()},
        "stock_from": "config" if case.is_stock else "config with shape record",
        "slim_over_stock": ms["slim"] / ms["stock"],
        "dense_flops": flops,
        "slim_flops": slim_flops,
        "speed_up": speed_up,
        "ideal": flops / slim_flops,
        "fraction": speed_up * slim_flops / flops,
    }


def measure_times(case: Case) -> Iterator[dict[str, Any]]:
    """Time everything that happens once in a run, and compare it with what it cannot be faster than.

    Args:
        case: The case.

    Yields:
        One record: seconds to find the structures, to score the units of all, to read all weights once, to compact, to
        save and to load; the ratio of compacting to reading; and that of loading slim to dense, without and
        with reading the weights, which are mapped and read from the file when they are needed, beside the slim model's
        share of the bytes.
    """
    masked = case.build_masked()
    times = _time_search(case, masked) | _time_compaction(case, masked) | _time_files(case, masked)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    yield {
        **case.to_record(),
        "first_parse_s": run_fresh(time_first_parse, case.config),
        **{f"{name}_s": value for name, value in seconds.items()},
        "compact_over_read": seconds["compact"] / seconds["read"],
        "parameters": case.parameters,
        "slim_parameters": case.slim_parameters,
        "load_ratio": seconds["load_slim"] / seconds["load_dense"],
        "load_read_ratio": seconds["load_read_slim"] / seconds["load_read_dense"],
        "share": case.slim_bytes / case.bytes,
    }


def time_first_parse(config: PreTrainedConfig) -> float:
    """Time a search for structures, to be called in a process that has made none.

    Args:
        config: The config of the model.

    Returns:
        Seconds.
    """
    return time_call(functools.partial(find_structures, build_meta(config)), torch.device("cpu"))


def _time_search(case: Case, masked: nn.Module) -> dict[str, list[float]]:
    """Finding and scoring the structures."""
    structures, shards = find_structures(masked).structures, find_shards(masked)
    for structure in structures:
        for member in structure.outputs:
            weight = get_tensor(masked, member.tensor)
            weight.grad = torch.ones_like(weight)
    calls: dict[str, Callable[[], Any]] = {
        "parse": lambda: find_structures(masked),
        "score": lambda: score_structures(masked, structures, case.settings().slim_criterion, shards),
    }
    times = time_alternately(calls, repeats=case.arguments.repeats, device=case.device, desc="Parse, score")
    masked.zero_grad()
    return times


def _time_compaction(case: Case, masked: nn.Module) -> dict[str, list[float]]:
    """Reading the weights in turn with compacting a fresh copy."""
    times: dict[str, list[float]] = {"read": [], "compact": []}
    read_weights(masked)
    for _ in range(min(case.arguments.repeats, _COMPACTIONS)):
        model = copy.deepcopy(masked)
        times["read"].append(time_call(functools.partial(read_weights, masked), case.device))
        times["compact"].append(time_call(functools.partial(case.slim, model), case.device))
    return times


def _time_files(case: Case, masked: Any) -> dict[str, list[float]]:
    slim, repeats = case.build_slim(), case.arguments.repeats
    with tempfile.TemporaryDirectory() as name, without_bars():
        dense_folder, slim_folder = Path(name, "dense"), Path(name, "slim")
        saving: dict[str, Callable[[], Any]] = {
            "save_dense": lambda: masked.save_pretrained(dense_folder),
            "save_slim": lambda: slim.save_pretrained(slim_folder),
            "save_slimmed": lambda: save_slimmed(masked, Path(name, "saved"), verify=False),
        }
        loading: dict[str, Callable[[], Any]] = {
            "load_dense": lambda: case.load(dense_folder),
            "load_slim": lambda: case.load(slim_folder),
            "load_read_dense": lambda: read_weights(case.load(dense_folder)),
            "load_read_slim": lambda: read_weights(case.load(slim_folder)),
        }
        times: dict[str, list[float]] = {}
        for desc, calls, rounds in (("Save", saving, min(repeats, _COMPACTIONS)), ("Load", loading, repeats)):
            times |= time_alternately(calls, repeats=rounds, device=case.device, desc=desc, warm_up=1)
    return times
