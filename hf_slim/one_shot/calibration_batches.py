"""From a data set to the batches of a calibration: the columns that the model takes, cut, collated, without labels."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator
from transformers.utils import find_labels

from ..arguments import check_whole
from ..parallel import find_device
from ..proof import RUN_ERRORS, evaluating

_LABELS = ("label", "labels", "label_ids")
"""What the default collator makes `labels` of, or leaves."""
_DECODED = frozenset(("labels", "decoder_input_ids", "decoder_inputs_embeds"))
"""What gives a decoder behind an encoder its inputs."""
_SAMPLES = ("input_ids", "inputs_embeds", "attention_mask")
"""What has one row for each sample."""


class Calibration(NamedTuple):
    """What a model is calibrated on.

    Args:
        batches: The batches, on the CPU.
        sample: The first sample alone; of a loader whose batches cannot be cut the first batch.
    """

    batches: list[dict[str, Any]]
    sample: dict[str, Any]


def make_batches(
    model: nn.Module,
    dataset: Any,
    *,
    num_samples: int,
    max_seq_length: int | None,
    batch_size: int,
    data_collator: Any,
    with_labels: bool,
) -> Calibration:
    """Take the first samples of a data set as the batches of a calibration.

    Args:
        model: The model; columns that its forward pass does not take are left out, as the Trainer does.
        dataset: A data set, an iterable or a list of dicts; or a `DataLoader`, whose batches are taken as they are.
        num_samples: How many samples to take.
        max_seq_length: Longer sequences are cut; None if none are to be.
        batch_size: Samples of a batch.
        data_collator: Makes a batch of samples; None for the default one of transformers.
        with_labels: Whether the model needs labels: those of an encoder-decoder make its decoder's inputs.

    Returns:
        The batches.

    Raises:
        ValueError: If an argument is of a wrong type, the data set has too few samples, or lacks what the model takes.
    """
    for name, value in (("num_calibration_samples", num_samples), ("batch_size", batch_size)):
        check_whole(name, value)
    if max_seq_length is not None:
        check_whole("max_seq_length", max_seq_length)
    if not (isinstance(dataset, Iterable) or _is_indexed(dataset)) or isinstance(dataset, (str, bytes, Mapping)):
        raise ValueError(
            f"dataset must be a data set, a list of dicts or a DataLoader, got {type(dataset).__name__}: for one "
            "with splits pass one of them, such as dataset['train']."
        )
    if isinstance(dataset, DataLoader):
        batches = list(_take_batches(dataset, num_samples))
        sample = cut_batch(batches[0], 1) if batches else {}
        found = sum(map(_count_rows, batches))
    else:
        numbered = not isinstance(dataset, Iterable)
        source = (dataset[number] for number in range(len(dataset))) if numbered else iter(dataset)
        rows = [_check_row(row) for row in islice(source, num_samples)]
        columns = list(rows[0]) if rows else []
        found = len(rows)
    if found < num_samples:
        raise ValueError(
            f"The data set has {found} samples, and num_calibration_samples={num_samples} asks for more: pass "
            f"num_calibration_samples={found} or fewer, or more data."
            if found
            else "The data set is empty: slim needs samples to calibrate on."
        )
    if not isinstance(dataset, DataLoader):
        rows = [_cut_row(model, row, max_seq_length) for row in rows]
        _check_columns(model, rows[0], columns)
        collate = default_data_collator if data_collator is None else data_collator
        batches = [_collate(collate, rows[start : start + batch_size]) for start in range(0, found, batch_size)]
        sample = _collate(collate, rows[:1])
    left_out = () if with_labels else (*_LABELS, *find_labels(type(model)))
    batches, sample = [_drop(model, batch, left_out) for batch in batches], _drop(model, sample, left_out)
    _check_columns(model, sample, None)
    _check_decoder(model, sample)
    return Calibration(batches, sample)


@contextmanager
def naming_batch(model: nn.Module, batch: Mapping[str, Any], number: int) -> Iterator[None]:
    """Say on which batch a model failed that cannot run on it; a ValueError of ours is left as it is.

    Args:
        model: The model.
        batch: The batch.
        number: Its number.

    Yields:
        Nothing.

    Raises:
        ValueError: If the model cannot run on it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RUN_ERRORS as error:
        if isinstance(error, ValueError) and _is_ours(error):
            raise
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in batch.items() if isinstance(v, torch.Tensor))
        raise ValueError(
            f"{type(model).__name__} cannot run on calibration batch {number}, of {shapes}: {error}. "
            "Look at whether its tokens are in the model's vocabulary, and no sequence longer than the model takes "
            "(max_seq_length)."
        ) from error


def has_decoder(model: nn.Module) -> bool:
    """Whether labels make the inputs of a decoder behind an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_ours(error: BaseException) -> bool:
    """Whether code of this library raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("hf_slim.")


def _is_indexed(dataset: Any) -> bool:
    """Whether it gives samples by their numbers, as map-style data sets of torch do."""
    return hasattr(type(dataset), "__getitem__") and hasattr(type(dataset), "__len__")


def _check_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"A sample of the data set must be a dict of the model's inputs, got {type(row).__name__}.")
    return dict(row)


def _check_columns(model: nn.Module, row: Mapping[str, Any], columns: Any) -> None:
    """Refuse data without the model's main input."""
    taken = _find_taken(model)
    main = getattr(model, "main_input_name", None)
    if main is None or taken is None:
        return
    if {main, "inputs_embeds"}.isdisjoint(row):
        raise ValueError(
            f"The data set has no column {main!r}, which {type(model).__name__} needs; it has "
            f"{', '.join(columns or row) or 'none that the model takes'}, and the model takes {', '.join(taken)}. "
            "Tokenize the data set, or make features of it, first."
        )


def _check_decoder(model: nn.Module, sample: Mapping[str, Any]) -> None:
    """Refuse data without the decoder's inputs, unless the model makes them of the encoder's."""
    if not has_decoder(model) or not _DECODED.isdisjoint(sample):
        return
    try:
        with evaluating(model):
            model(**send_to_device(dict(sample), find_device(model)))
    except RUN_ERRORS as error:
        raise ValueError(
            f"The data set has no labels and no decoder_input_ids, one of which the decoder of {type(model).__name__} "
            f"needs: add labels to it. The model says: {error}"
        ) from error


def _find_taken(model: nn.Module) -> list[str] | None:
    """The names that the forward pass takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD]
    return None if takes_any and getattr(model, "main_input_name", None) not in names else names


def _cut_row(model: nn.Module, row: dict[str, Any], max_seq_length: int | None) -> dict[str, Any]:
    """The columns that the model takes, and labels, sequences no longer than asked."""
    names = _find_taken(model)
    taken = {name: value for name, value in row.items() if names is None or name in (*names, *_LABELS)}
    if max_seq_length is None or "input_ids" not in taken:
        return taken
    return {name: value[:max_seq_length] if _is_sequence(value) else value for name, value in taken.items()}


def _is_sequence(value: Any) -> bool:
    """Whether it has one number for each token."""
    if isinstance(value, (list, tuple)):
        return not value or not isinstance(value[0], (list, tuple))
    return getattr(value, "ndim", 0) == 1


def _collate(collate: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = dict.fromkeys(name for row in rows for name in row)
    lacking = {name: number for name in columns for number, row in enumerate(rows) if name not in row}
    if lacking:
        name, number = next(iter(lacking.items()))
        raise ValueError(f"Sample {number} of a batch has no {name!r}, which others do: give it to all, or to none.")
    try:
        return dict(collate([dict(row) for row in rows]))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"The samples cannot be made a batch: {error}. Where they are of different lengths, pass a data_collator "
            "that pads them, such as DataCollatorWithPadding(tokenizer); a max_seq_length cuts, but does not pad."
        ) from error


def _take_batches(loader: Iterable[Any], num_samples: int) -> Iterator[dict[str, Any]]:
    """The batches of a loader until there are enough samples, the last one cut where it can be."""
    left = num_samples
    for batch in loader:
        taken = cut_batch(dict(_check_row(batch)), left)
        left -= _count_rows(taken)
        yield taken
        if left <= 0:
            return


def cut_batch(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The first samples of a batch.

    Args:
        batch: The batch.
        rows: How many samples.

    Returns:
        The batch of them; the whole one where a tensor is not of one entry for each sample, such as image patches.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    if len({len(tensor) for tensor in tensors.values()}) != 1:
        return dict(batch)
    return {name: value[:rows] if name in tensors else value for name, value in batch.items()}


def _count_rows(batch: Mapping[str, Any]) -> int:
    """How many samples a batch has: by its tokens, where there are some."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    return len(next((tensors[name] for name in (*_SAMPLES, *tensors) if name in tensors), ()))


def _drop(model: nn.Module, batch: Mapping[str, Any], left_out: Iterable[str]) -> dict[str, Any]:
    names, left_out = _find_taken(model), set(left_out)
    return {
        name: value
        for name, value in batch.items()
        if name not in left_out and (names is None or name in (*names, *_LABELS))
    }
