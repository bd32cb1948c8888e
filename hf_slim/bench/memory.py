"""Peak memory, each measurement in a process of its own, and the first search for structures in one."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..compaction import model_slim
from ..saving import without_bars
from ..structures import find_structures
from .flags import BenchArguments
from .shapes import Case, build_masked, build_meta, build_model, build_slim, load_model, make_batch, slim_settings
from .train_steps import make_steps

_TRAIN = ("plain", "scoring", "pruning", "pruning live", "masked", "live")
_INFERENCE = ("forward dense", "forward slim")
_TIMES = ("compact", "save dense", "save slim", "load dense", "load slim")
_STEPS = 3
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt in malloc.h
_PIECE = 64 * 1024
_RESET = "/proc/self/clear_refs"
"""What Linux takes a 5 in for setting the peak to what is in use; see proc(5)."""


def measure_memory(case: Case, batch_size: int, length: int, arguments: BenchArguments) -> Iterator[dict[str, Any]]:
    """Measure the peak memory of train steps, forward passes, compacting, saving and loading.

    Of these only what is timed in the same run, if anything is.

    Args:
        case: The case.
        batch_size: Sequences in a batch.
        length: Tokens in a sequence.
        arguments: The flags.

    Yields:
        For each the peak in bytes, beyond what the process held before there was a model, and its ratio to the peak of
        the plain step (for train steps), of the dense forward pass, or to the bytes of the dense model. None where the
        peak cannot be measured: on the CPU outside Linux.
    """
    peaks: dict[str, int | None] = {}
    base: int | None
    measured = {"train": _TRAIN, "inference": _INFERENCE, "times": _TIMES}
    parts = [part for part in measured if part in arguments.parts] or measured
    whats = [what for part in parts for what in measured[part]]
    with tempfile.TemporaryDirectory() as folder:
        with without_bars():
            build_model(case.config, arguments).save_pretrained(Path(folder, "dense"))
            build_slim(case, arguments).save_pretrained(Path(folder, "slim"))
        for what in logging.tqdm(whats, desc="Memory", leave=False):
            peak = peaks[what] = run_fresh(_find_peak, what, case, batch_size, length, arguments, folder)
            against, base = "dense model", case.bytes
            if what in _TRAIN:
                against, base = "plain step", peaks["plain"]
            elif what in _INFERENCE:
                against, base = "forward dense", peaks["forward dense"]
            yield {
                **case.to_record(batch_size, length),
                "what": f"{what} step" if what in _TRAIN else what,
                "peak_bytes": peak,
                "against": against,
                "ratio": peak / base if peak is not None and base else None,
            }


def measure_first_parse(case: Case, arguments: BenchArguments) -> float:
    """Time the first search for structures of a process.

    Args:
        case: The case.
        arguments: The flags.

    Returns:
        Seconds.
    """
    return run_fresh(_time_first_parse, case, arguments)


def read_weights(model: nn.Module) -> None:
    """Read every weight once from memory, and nothing else.

    Args:
        model: The model.
    """
    for parameter in model.parameters():
        parameter.detach().sum()


def run_fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, which has imported the package and done nothing else.

    Args:
        function: A function of a module.
        *args: What it takes.

    Returns:
        What it gives.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *args).result()


def _time_first_parse(case: Case, arguments: BenchArguments) -> float:
    model = build_meta(case.config)
    start = time.perf_counter()
    find_structures(model)
    return time.perf_counter() - start


def _find_peak(
    what: str, case: Case, batch_size: int, length: int, arguments: BenchArguments, folder: str
) -> int | None:
    """The peak of the last of some calls: those before it do what only the first one does."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if not _can_measure(arguments.torch_device):
        return None
    _return_memory_at_once()
    logging.disable_progress_bar()
    with_files = what.startswith("load")  # whose weights are pages of files
    before = _read_held(arguments.torch_device, with_files=with_files)
    prepare, call = _make_call(what, case, batch_size, length, arguments, folder)
    prepare()
    _reset_peak(arguments.torch_device)
    call()
    return _read_peak(arguments.torch_device, with_files=with_files) - before


def _make_call(
    what: str, case: Case, batch_size: int, length: int, arguments: BenchArguments, folder: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What to do before the measurement, and what to measure."""
    if what in _TRAIN:
        step = make_steps(case, batch_size, length, arguments, (what,))[what]
        return step, functools.partial(_repeat, step)
    verb, _, which = what.partition(" ")
    model: Any
    if verb == "compact":
        model = build_masked(case, arguments)
        return lambda: find_structures(model), lambda: model_slim(
            model, slim_settings(case.sparsity).slim_round_to, verify=False
        )
    if verb == "load":
        return lambda: None, lambda: read_weights(load_model(case, Path(folder, which), arguments))
    model = build_model(case.config, arguments) if which == "dense" else build_slim(case, arguments)
    if verb == "save":
        return lambda: None, lambda: model.save_pretrained(Path(folder, "again"))
    ids = make_batch(case.config, batch_size, length, arguments.torch_device)["input_ids"]
    forward = torch.inference_mode()(lambda: model.eval()(input_ids=ids))
    return forward, forward


def _repeat(step: Callable[[], Any]) -> None:
    for _ in range(_STEPS):
        step()


def _return_memory_at_once() -> None:
    """Have glibc give tensors back to the system when they are freed, so that the peak is that of what is in use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _PIECE)
        mallopt(_TRIM_THRESHOLD, _PIECE)


def _can_measure(device: torch.device) -> bool:
    return device.type == "cuda" or os.access(_RESET, os.W_OK)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path(_RESET).write_text("5")


def _read_peak(device: torch.device, *, with_files: bool) -> int:
    """The peak since it was reset; pages of program files, which are read in piece by piece, are best left out."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = _read_status()
    return status["VmHWM"] - (0 if with_files else status["RssFile"])


def _read_held(device: torch.device, *, with_files: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    status = _read_status()
    return status["VmRSS"] if with_files else status["RssAnon"]


def _read_status() -> dict[str, int]:
    """The sizes in bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}
