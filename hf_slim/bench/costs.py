"""What a slim model costs and saves outside training: inference, and parsing, scoring, compacting, saving, loading."""

from __future__ import annotations

import copy
import functools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compaction import model_slim
from ..parallel import find_shards
from ..saving import measure_latency, save_slimmed, time_alternately, time_call, without_bars
from ..structures import find_structures, get_tensor
from ..training import score_structures
from .flags import BenchArguments
from .memory import measure_first_parse, read_weights
from .shapes import Case, build_masked, build_model, build_slim, count_flops, load_model, make_batch, slim_settings

_COMPACTIONS = 3
"""Timed at most, since each needs a fresh masked model."""


def measure_inference(case: Case, batch_size: int, length: int, arguments: BenchArguments) -> Iterator[dict[str, Any]]:
    """Time a forward pass of the dense, the slim and a stock model, alternately.

    The stock model is built from the slim model's config alone. Where the config cannot express the shape by its own
    fields, the config holds the shape record, and the stock model is a fresh one of that shape.

    Args:
        case: The case.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        arguments: The flags.

    Yields:
        One record: median milliseconds of each, operations by count, and the fraction that is reached of the speed-up
        that the operations give.
    """
    models = {
        "dense": build_model(case.config, arguments),
        "slim": build_slim(case, arguments),
        "stock": build_model(case.slim_config, arguments),
    }
    batch = make_batch(case.config, batch_size, length, arguments.torch_device)
    ms = measure_latency(models, {"input_ids": batch["input_ids"]}, repeats=arguments.repeats)
    flops = count_flops(case.config, batch_size, length)
    slim_flops = count_flops(case.slim_config, batch_size, length)
    speed_up = ms["dense"] / ms["slim"]
    yield {
        **case.to_record(batch_size, length),
        "dense_ms": ms["dense"],
        "slim_ms": ms["slim"],
        "stock_ms": ms["stock"],
        "stock_from": "config" if case.is_stock else "config with shape record",
        "slim_over_stock": ms["slim"] / ms["stock"],
        "dense_flops": flops,
        "slim_flops": slim_flops,
        "speed_up": speed_up,
        "ideal": flops / slim_flops,
        "fraction": speed_up * slim_flops / flops,
    }


def measure_times(case: Case, arguments: BenchArguments) -> Iterator[dict[str, Any]]:
    """Time everything that happens once in a run, and compare it with what it cannot be faster than.

    Args:
        case: The case.
        arguments: The flags.

    Yields:
        One record: seconds to find the structures, to score the units of all, to read all weights once, to compact, to
        save and to load; the ratio of compacting to reading; and that of loading slim to dense, without and
        with reading the weights, which are mapped and read from the file when they are needed, beside the slim model's
        share of the bytes.
    """
    device = arguments.torch_device
    masked = build_masked(case, arguments)
    structures, shards = find_structures(masked).structures, find_shards(masked)
    criterion = slim_settings(case.sparsity).slim_criterion
    for structure in structures:
        for member in structure.outputs:
            weight = get_tensor(masked, member.tensor)
            weight.grad = torch.ones_like(weight)
    times = time_alternately(
        {
            "parse": lambda: find_structures(masked),
            "score": lambda: score_structures(masked, structures, criterion, shards),
        },
        repeats=arguments.repeats,
        device=device,
        desc="Parse, score",
    )
    masked.zero_grad()
    times |= _time_compaction(case, masked, arguments)
    times |= _time_files(case, masked, arguments)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    yield {
        **case.to_record(),
        "first_parse_s": measure_first_parse(case, arguments),
        **{f"{name}_s": value for name, value in seconds.items()},
        "compact_over_read": seconds["compact"] / seconds["read"],
        "parameters": case.parameters,
        "slim_parameters": case.slim_parameters,
        "load_ratio": seconds["load_slim"] / seconds["load_dense"],
        "load_read_ratio": seconds["load_read_slim"] / seconds["load_read_dense"],
        "share": case.slim_bytes / case.bytes,
    }


def _time_compaction(case: Case, masked: nn.Module, arguments: BenchArguments) -> dict[str, list[float]]:
    """Reading the weights in turn with compacting a fresh copy."""
    device = arguments.torch_device
    multiple = slim_settings(case.sparsity).slim_round_to
    times: dict[str, list[float]] = {"read": [], "compact": []}
    read_weights(masked)
    for _ in range(min(arguments.repeats, _COMPACTIONS)):
        model = copy.deepcopy(masked)
        times["read"].append(time_call(functools.partial(read_weights, masked), device))
        times["compact"].append(time_call(functools.partial(model_slim, model, multiple, verify=False), device))
    return times


def _time_files(case: Case, masked: Any, arguments: BenchArguments) -> dict[str, list[float]]:
    slim = build_slim(case, arguments)
    repeats = min(arguments.repeats, _COMPACTIONS)
    with tempfile.TemporaryDirectory() as name, without_bars():
        dense_folder, slim_folder = Path(name, "dense"), Path(name, "slim")
        times = time_alternately(
            {
                "save_dense": lambda: masked.save_pretrained(dense_folder),
                "save_slim": lambda: slim.save_pretrained(slim_folder),
                "save_slimmed": lambda: save_slimmed(masked, Path(name, "saved"), verify=False),
            },
            repeats=repeats,
            device=arguments.torch_device,
            desc="Save",
            warm_up=1,
        )
        times |= time_alternately(
            {
                "load_dense": lambda: load_model(case, dense_folder, arguments),
                "load_slim": lambda: load_model(case, slim_folder, arguments),
                "load_read_dense": lambda: read_weights(load_model(case, dense_folder, arguments)),
                "load_read_slim": lambda: read_weights(load_model(case, slim_folder, arguments)),
            },
            repeats=arguments.repeats,
            device=arguments.torch_device,
            desc="Load",
            warm_up=1,
        )
    return times
