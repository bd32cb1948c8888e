"""The folder of a slim model: written beside its place, checked, and put there whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compaction import find_pretrained, find_stock_class
from ..parallel import is_dispatched, read_tensor
from ..proof import VerificationError, compare_models
from .atomic_folder import replacing
from .card_facts import Provenance, find_card_facts
from .model_card import write_model_card
from .report import SlimReport
from .saved_report import REPORT, SavedReport, list_files, write_report
from .wrapped_models import Saved, check_container, save_container


def write_folder(
    target: Path,
    slim: nn.Module,
    report: SlimReport,
    name: str,
    processing_class: Any,
    inputs: Sequence[Mapping[str, Any]],
    provenance: Provenance,
    *,
    max_shard_size: int | str | None = None,
) -> tuple[PurePosixPath, ...]:
    """Write a slim model with its card beside a folder, check it as it will be, and put it in its place.

    Args:
        target: The folder, from `check_folder`.
        slim: The slim model.
        report: What slimming made of it.
        name: What its card calls it.
        processing_class: Tokenizer or processor to save along, or None.
        inputs: For each transformers model in it a batch on which the folder is checked; empty for no check.
        provenance: Where the model comes from, for the card.
        max_shard_size: Size from which on the weights are split.

    Returns:
        The files that were written.

    Raises:
        VerificationError: If the folder gives another model; nothing is written then.
    """
    with replacing(target) as new:
        saved = save_container(slim, new.path, max_shard_size)
        if processing_class is not None:
            processing_class.save_pretrained(new.path)
        _describe(new.path, saved[0], report, name, provenance, target / "README.md")
        new.join_others()
        if inputs:
            batches = dict(zip(find_pretrained(slim), inputs, strict=True))
            for part, place, _ in saved:
                _check_reload(place, part, batches[part])
            if not isinstance(slim, PreTrainedModel):
                check_container(slim, new.path)
    return new.written


def _describe(
    folder: Path, saved: Saved, report: SlimReport, name: str, provenance: Provenance, earlier: Path
) -> None:
    """Write the card with its picture, and the report."""
    facts = find_card_facts(saved.model, provenance, has_remote_code=saved.has_remote_code)
    write_model_card(facts, report, folder, name, earlier)
    write_report(folder, SavedReport(name, report, facts, tuple(list_files(folder, REPORT))))


def _check_reload(folder: Path, slim: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Refuse a folder that does not give the slim model again: its weights bit for bit, and what they compute."""
    with _loaded(folder, slim) as reloaded:
        loaded = reloaded.state_dict()
        for key in slim.state_dict():
            if key not in loaded or not torch.equal(read_tensor(slim, key), read_tensor(reloaded, key)):
                raise VerificationError(
                    f"The saved folder gives another {key} than the slim model has. Nothing was saved."
                )
        try:
            compare_models(slim, reloaded, inputs)
        except VerificationError as error:
            raise VerificationError(
                f"The saved folder gives a model that computes something else. {error} Nothing was saved."
            ) from error


@contextmanager
def _loaded(folder: Path, slim: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model of a folder, on the device of another, or spread and offloaded as that one is."""
    stock: Any = find_stock_class(slim)
    attention = slim.config._attn_implementation_internal
    load = partial(stock.from_pretrained, folder, dtype=slim.dtype, attn_implementation=attention)
    if not is_dispatched(slim):
        yield load().to(slim.device)
        return
    with TemporaryDirectory(prefix=".hf_slim-", dir=folder.parent) as apart:
        yield load(device_map=slim.hf_device_map, offload_folder=apart)
