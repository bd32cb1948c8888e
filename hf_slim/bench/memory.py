"""Peak memory, each measurement in a process of its own."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers.utils import logging

from ..costs import without_bars
from ..structures import find_structures
from .shapes import Case
from .train_steps import STEPS, make_steps

_WHATS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "train": (tuple(STEPS), "plain step", " step"),
    "inference": (("forward dense", "forward slim"), "forward dense", ""),
    "times": (("compact", "save dense", "save slim", "load dense", "load slim"), "dense model", ""),
}
"""For each part what is measured of it, what that is compared with, and what is added to its name."""
_REPEATS = 3
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt in malloc.h
_PIECE = 64 * 1024
_RESET = "/proc/self/clear_refs"
"""What Linux takes a 5 in for setting the peak to what is in use; see proc(5)."""


def measure_memory(case: Case) -> Iterator[dict[str, Any]]:
    """Measure the peak memory of train steps, forward passes, compacting, saving and loading.

    Of these only what is timed in the same run, if anything is.

    Args:
        case: The case, with the size of its batches.

    Yields:
        For each the peak in bytes, beyond what the process held before there was a model, and its ratio to the peak of
        the plain step (for train steps), of the dense forward pass, or to the bytes of the dense model. None where the
        peak cannot be measured: on the CPU outside Linux.
    """
    peaks: dict[str, int | None] = {"dense model": case.bytes}
    parts = [part for part in _WHATS if part in case.arguments.parts] or _WHATS
    with tempfile.TemporaryDirectory() as folder:
        with without_bars():
            case.build().save_pretrained(Path(folder, "dense"))
            case.build_slim().save_pretrained(Path(folder, "slim"))
        tasks = [(what, *_WHATS[part]) for part in parts for what in _WHATS[part][0]]
        for what, _, against, suffix in logging.tqdm(tasks, desc="Memory", leave=False):
            peak = peaks[f"{what}{suffix}"] = run_fresh(_find_peak, what, case, folder)
            base = peaks[against]
            yield {
                **case.to_record(),
                "what": f"{what}{suffix}",
                "peak_bytes": peak,
                "against": against,
                "ratio": peak / base if peak is not None and base else None,
            }


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


def _find_peak(what: str, case: Case, folder: str) -> int | None:
    """The peak of the last of some calls: those before it do what only the first one does."""
    if case.arguments.threads is not None:
        torch.set_num_threads(case.arguments.threads)
    on_gpu = case.device.type == "cuda"
    if not on_gpu and not os.access(_RESET, os.W_OK):
        return None
    _return_memory_at_once()
    logging.disable_progress_bar()
    # Weights that are loaded are pages of files; those of programs, which are read in piece by piece, are left out.
    with_files = what.startswith("load")
    before = torch.cuda.memory_allocated() if on_gpu else _read_held(with_files)
    prepare, call = _make_call(what, case, folder)
    prepare()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path(_RESET).write_text("5")
    call()
    return _read_peak(with_files) - before


def _make_call(what: str, case: Case, folder: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What to do before the measurement, and what to measure."""
    if what in STEPS:
        step = make_steps(case, (what,))[what]
        return step, functools.partial(_repeat, step)
    verb, _, which = what.partition(" ")
    if verb == "load":
        return _do_nothing, lambda: read_weights(case.load(Path(folder, which)))
    if verb == "compact":
        masked = case.build_masked()
        return lambda: find_structures(masked), lambda: case.slim(masked)
    model: Any = case.build() if which == "dense" else case.build_slim()
    if verb == "save":
        return _do_nothing, lambda: model.save_pretrained(Path(folder, "again"))
    ids = case.make_batch()["input_ids"]
    forward = torch.inference_mode()(lambda: model.eval()(input_ids=ids))
    return forward, forward


def _do_nothing() -> None:
    """Saving and loading need no call before them."""


def _repeat(step: Callable[[], Any]) -> None:
    for _ in range(_REPEATS):
        step()


def _return_memory_at_once() -> None:
    """Have glibc give tensors back to the system when they are freed, so that the peak is that of what is in use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _PIECE)
        mallopt(_TRIM_THRESHOLD, _PIECE)


def _read_held(with_files: bool) -> int:
    info = psutil.Process().memory_info()
    return info.rss - (0 if with_files else info.shared)


def _read_peak(with_files: bool) -> int:
    """The peak since it was reset, which psutil does not tell on Linux."""
    import resource  # not on Windows, where nothing is measured

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak - (0 if with_files else psutil.Process().memory_info().shared)
