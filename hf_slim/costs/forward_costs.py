"""What one forward pass costs before and after, for a report: counted and timed, where that is quickly done."""

from __future__ import annotations

import platform
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..compaction import find_pretrained
from ..parallel import is_dispatched, is_spread
from ..proof import RUN_ERRORS
from ..structures import Structure
from .flop_costs import Batches, count_flops, make_batches
from .skeleton import Kept, Skeleton
from .timing import choose_clock, time_alternately, time_call

_LARGEST = 1.5e9  # bytes of a dense model from which on neither is done
_SECONDS = 0.3  # that the timing may take
_FEWEST, _MOST = 3, 10  # rounds of it
_LONGEST = 200  # letters of an error that are told


class ForwardCosts(NamedTuple):
    """What a forward pass on one example costs; None for what is not known.

    Args:
        flops_before: Floating-point operations of the dense model.
        flops_after: Those of the slimmed model.
        milliseconds_before: The time of the dense model, the median of both models timed in turn.
        milliseconds_after: That of the slimmed model.
        machine: What they were timed on.
        missing: What is not known, and why; empty if all is.
    """

    flops_before: int | None = None
    flops_after: int | None = None
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    machine: str = ""
    missing: str = ""


def make_small_skeleton(
    model: nn.Module, structures: Sequence[Structure], sizes: Mapping[str, torch.Size]
) -> Skeleton | str:
    """Keep the shape of a model that is about to be slimmed, if counting and timing it is cheap.

    Args:
        model: The model; units may have left it while it trained.
        structures: The structures of the dense model.
        sizes: For tensors from which units have left the sizes that they had.

    Returns:
        Its modules without values; or why there are none, for models of more than 1.5 GB, for sharded and offloaded
        ones, for modules that hold no transformers model, and where the modules cannot be copied.
    """
    dense = sum(sizes.get(name, p.shape).numel() * p.element_size() for name, p in model.named_parameters())
    if dense > _LARGEST:
        return f"the dense model has more than {_LARGEST / 1e9:.1f} GB"
    if is_spread(model) or is_dispatched(model):
        return "the model is spread over devices or processes"
    if not find_pretrained(model):
        return "it holds no transformers model, so that no inputs can be made for it"
    try:
        return Skeleton(model, structures, sizes)
    except RUN_ERRORS as error:
        return f"its modules cannot be copied ({_shorten(error)})"


def find_forward_costs(skeleton: Skeleton | str, model: nn.Module, kept: Kept) -> ForwardCosts:
    """Count and time a forward pass before and after, on one example.

    Of a text that is 128 tokens, or half as many as the model has positions, if that is less.

    Models of the old sizes and of the new, both with made weights, are counted without values and timed in turn. The
    time is not known where a third of a second does not do for it, and nothing of models that no inputs can be made
    for.

    Args:
        skeleton: The dense model; or why there is none.
        model: The slimmed model.
        kept: How many units the structures have.

    Returns:
        What is known, and why the rest is not.
    """
    if isinstance(skeleton, str):
        return ForwardCosts(missing=f"Operations and latency are not known: {skeleton}.")
    try:
        batches = make_batches(model, "the report")
        flops = count_flops(skeleton, batches, {})[""], count_flops(skeleton, batches, kept)[""]
        milliseconds = _time(skeleton, model, batches, kept)
    except RUN_ERRORS as error:
        why = f"the model cannot be run by itself on made inputs ({_shorten(error)})"
        return ForwardCosts(missing=f"Operations and latency are not known: {why}.")
    if milliseconds is None:
        why = f"a few passes take longer than {_SECONDS} s"
        return ForwardCosts(*flops, missing=f"The latency is not known: {why}.")
    return ForwardCosts(*flops, *milliseconds, name_machine(skeleton.device))


def _shorten(error: BaseException) -> str:
    """The first line of what an error says, for a sentence."""
    line = next(iter(str(error).splitlines()), "").partition(": pass a batch")[0].rstrip(".")
    return textwrap.shorten(line or type(error).__name__, _LONGEST, placeholder=" ...")


def name_machine(device: torch.device) -> str:
    """Name what computes.

    Args:
        device: Where a model is.

    Returns:
        The GPU, or the processor with the number of threads that PyTorch uses.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} of {platform.machine()}"
    threads = torch.get_num_threads()
    return f"{_name_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _name_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _time(skeleton: Skeleton, slim: nn.Module, batches: Batches, kept: Kept) -> tuple[float, float] | None:
    """Milliseconds before and after, if a few rounds fit in the time that there is."""
    device = skeleton.device
    clock = choose_clock(device)
    with torch.inference_mode():
        seconds = 2 * max(time_call(lambda: _run(slim, batches), device, clock), 1e-6)
        rounds = min(int(_SECONDS / seconds), _MOST)
        if rounds < _FEWEST:
            return None
        models = {"before": skeleton.build({}).eval(), "after": skeleton.build(kept).eval()}
        calls = {name: lambda model=model: _run(model, batches) for name, model in models.items()}
        times = time_alternately(calls, repeats=rounds, device=device, desc="Latency", warm_up=1, clock=clock)
    before, after = (1000 * statistics.median(times[name]) for name in models)
    return before, after


def _run(model: nn.Module, batches: Batches) -> None:
    for part, batch in zip(find_pretrained(model), batches, strict=True):
        part(**batch)
