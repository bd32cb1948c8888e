"""The moments of what the readers of each structure read, layer by layer, on what the layers before give then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..parallel import find_device
from ..proof import evaluating
from ..structures import Structure, get_tensor
from .calibration_batches import Calibration, naming_batch
from .input_moments import Moments, take_rows
from .kept_weights import finish
from .paused_passes import Enough, PausedPass, PausedPasses, paused
from .reading_layers import Gathered, Reader, Watch, find_readers
from .stops import find_stops

logger = logging.get_logger(__name__)

Found = Mapping[Reader, Moments]
"""What the readers of a structure read."""


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, in full float32, without caches, and experts one after the other.

    Args:
        model: The model, as it was afterwards but for its weights.

    Yields:
        Nothing.
    """
    precision = torch.get_float32_matmul_precision()
    device, modes = find_device(model).type, torch._C._len_torch_function_stack()
    with evaluating(model), torch.autocast("cpu", enabled=False), torch.autocast(device, enabled=False):
        for module in model.modules():
            config: Any = module.__dict__.get("config")
            if getattr(config, "use_cache", None):
                config.use_cache = False
            if isinstance(module, PreTrainedModel) and _has_experts(module):
                module.set_experts_implementation("eager")
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            finish(partial(_leave_modes, modes))


def _leave_modes(count: int) -> None:
    """Leave the function modes that are more than a number of them: an interrupt may fall into leaving `Watch`."""
    while torch._C._len_torch_function_stack() > count:
        torch._C._pop_torch_function_stack()


def visit_layers(
    model: nn.Module,
    structures: Sequence[Structure],
    data: Calibration,
    handle: Callable[[Structure, Found], None],
    description: str,
) -> None:
    """Go through a model layer by layer with all batches, and hand over what the readers of each structure read.

    The forward pass of each batch waits at the block around a structure. The block is run on what waits there, to see
    what is read in it; then `handle` may change the structure, and the passes go on from where they are. That is about
    two forward passes in all, and what is kept is what the passes hold while they wait.

    Args:
        model: The model, within `calibrating`.
        structures: The structures.
        data: The batches.
        handle: Called once for each structure, with what its readers read.
        description: What the progress bar says.

    Raises:
        ValueError: If the model cannot run on the batches, a layer is not reached, or reads what is not finite.
    """
    readers = {structure: find_readers(model, structure) for structure in structures}
    device = find_device(model)
    stops = find_stops(model, readers, send_to_device(data.sample, device))

    def send(batch: Mapping[str, Any]) -> Any:
        return send_to_device(dict(batch), device)

    bar = logging.tqdm(total=len(structures), desc=description)
    with bar, paused(model, data.batches, [stop.module for stop in stops], send) as passes:
        for stop in stops:
            for structure, once in stop.structures:
                waiting = passes.waiting_at(stop.module)
                found = _collect(model, readers[structure], passes, waiting, once=once)
                _require_reached(structure, found)
                handle(structure, found)
                bar.update()
            if stop is not stops[-1]:
                passes.release(stop.module)


@torch.no_grad()
def collect_squares(model: nn.Module, structures: Sequence[Structure], data: Calibration) -> dict[Structure, Found]:
    """The means and squares of what all readers read, in one plain pass, since those are small.

    Args:
        model: The model, within `calibrating`.
        structures: The structures.
        data: The batches.

    Returns:
        For each structure what its readers read.

    Raises:
        ValueError: As for `visit_layers`.
    """
    readers = {structure: find_readers(model, structure) for structure in structures}
    device = find_device(model)
    found = _make_moments(model, [reader for own in readers.values() for reader in own], whole=False)
    for number, batch in enumerate(logging.tqdm(data.batches, desc="Calibrating")):
        sent = send_to_device(dict(batch), device)
        note = partial(_note, found, sent)
        with Watch(model, found, note), naming_batch(model, batch, number):
            model(**sent)
    result: dict[Structure, Found] = {}
    for structure, own in readers.items():
        result[structure] = {reader: found[reader] for reader in own}
    for structure, part in result.items():
        _require_reached(structure, part)
    return result


def _has_experts(model: PreTrainedModel) -> bool:
    return any(parameter.dim() == 3 for parameter in model.parameters()) and hasattr(
        model, "set_experts_implementation"
    )


def _make_moments(model: nn.Module, readers: Sequence[Reader], *, whole: bool) -> dict[Reader, Moments]:
    return {
        reader: Moments(
            reader.view_weight(model).shape[1], get_tensor(model, reader.member.tensor).device, whole=whole
        )
        for reader in readers
    }


@torch.no_grad()
def _collect(
    model: nn.Module, readers: Sequence[Reader], passes: PausedPasses, waiting: Sequence[PausedPass], *, once: bool
) -> dict[Reader, Moments]:
    """Run the module at which passes wait, for what readers in it read."""
    found = _make_moments(model, readers, whole=True)
    for one in waiting:
        note = partial(_note, found, one.batch, once=once)
        with naming_batch(model, one.batch, one.number):
            passes.run_module(one, Watch(model, readers, note))
    return found


def _note(
    found: Mapping[Reader, Moments],
    batch: Mapping[str, Any],
    reader: Reader,
    values: torch.Tensor,
    gathered: Gathered | None,
    *,
    once: bool = False,
) -> None:
    found[reader].add(take_rows(values, reader, batch, gathered))
    if once:
        raise Enough


def _require_reached(structure: Structure, found: Found) -> None:
    """Refuse a structure of which no layer reads anything; of stacked experts some may."""
    if not any(moments.rows for moments in found.values()):
        raise ValueError(
            f"The calibration data do not reach {structure.name}: no product of its weight with an input was seen. "
            "Pass data that do, leave it out with slim_exclude, or use method='magnitude'."
        )
    left = [reader.name for reader, moments in found.items() if not moments.rows]
    if left:
        logger.warning(
            f"slim: the calibration data do not reach {', '.join(left)}: the other experts decide what goes, and the "
            "weights that stay there are as they were."
        )
