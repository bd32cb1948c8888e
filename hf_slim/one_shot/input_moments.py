"""The moments of what layers read, over calibration batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .reading_layers import Gathered, Reader

IGNORED = -100
"""Label of positions that do not count."""


class Moments:
    """First and second moments of the inputs of a layer, in float32.

    They are summed up about the mean of the first inputs, so that those that hardly vary leave a covariance, too.

    Args:
        inputs: How many inputs it has.
        device: Where to keep them.
        whole: Whether to keep products of all pairs of inputs, or only the squares.
    """

    def __init__(self, inputs: int, device: torch.device, *, whole: bool) -> None:
        """See the class."""
        self.rows = 0
        self._first = torch.zeros(inputs, device=device)
        self._sum = torch.zeros(inputs, device=device)
        self._products = torch.zeros((inputs, inputs) if whole else (inputs,), device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Add inputs, shape `[rows, inputs]`."""
        if not len(rows):
            return
        rows = rows.float()
        if not self.rows:
            self._first = rows.mean(0)
        rows = rows - self._first
        self.rows += len(rows)
        self._sum += rows.sum(0)
        if self._products.dim() == 2:
            self._products.addmm_(rows.t(), rows)
        else:
            self._products += rows.square().sum(0)

    @property
    def mean(self) -> torch.Tensor:
        """The mean, shape `[inputs]`."""
        return self._first + self._sum / max(1, self.rows)

    def take(self, *, centred: bool) -> torch.Tensor:
        """The second moment, once: its memory is that of the sums.

        Args:
            centred: Whether about the mean (the covariance) instead of about zero.

        Returns:
            Shape `[inputs, inputs]`, or `[inputs]` where only squares are kept.
        """
        products = self._products.div_(max(1, self.rows))
        self._products = products.new_zeros(0)
        around, mean = self.mean - self._first, self.mean
        if products.dim() == 2:
            products.addr_(around, around, alpha=-1)
            return products if centred else products.addr_(mean, mean)
        products.sub_(around.square()).clamp_(min=0)
        return products if centred else products.add_(mean.square())


def take_rows(
    values: torch.Tensor, reader: Reader, batch: Mapping[str, Any], gathered: Gathered | None = None
) -> torch.Tensor:
    """The inputs of a layer at the positions that count, without padding.

    Args:
        values: What the layer reads, `[..., inputs]`.
        reader: The layer.
        batch: What the model was given.
        gathered: Which rows these were taken out of a matrix; None if they were not, as far as was seen.

    Returns:
        Shape `[rows, inputs]`. Where the positions are not those of the batch (image patches), all of them.

    Raises:
        ValueError: If one is not finite, or an expert's are not known and some are padding.
    """
    mask = find_mask(batch, decoded="decoder" in reader.member.tensor.split("."))
    rows = values.reshape(-1, values.shape[-1])
    if mask is not None:
        counts = mask.flatten().to(rows.device)
        if gathered is not None and gathered.size == len(counts):
            rows = rows[counts[gathered.rows]]
        elif values.shape[:-1] == mask.shape or (values.dim() == 2 and len(values) == len(counts)):
            rows = rows[counts]
        elif reader.expert is not None and not counts.all():
            raise ValueError(
                f"Which tokens {reader.name} reads cannot be told, so that those that are padding cannot be left out: "
                "take sequences of one length, or method='taylor' or 'magnitude'."
            )
    if not rows.isfinite().all():
        raise ValueError(
            f"{reader.name} reads NaN or infinite activations, so that nothing can be told of its inputs: look at "
            "the model and at the data, in which type it computes, and whether a batch has rows without any token."
        )
    return rows


def find_mask(batch: Mapping[str, Any], *, decoded: bool) -> torch.Tensor | None:
    """The positions that count.

    Args:
        batch: What the model was given.
        decoded: Whether those of the decoder are asked for, where there is one with an encoder.

    Returns:
        Booleans of shape `[samples, positions]`; None if nothing says which count.
    """
    labels = batch.get("labels")
    if decoded and ("decoder_input_ids" in batch or "labels" in batch):
        mask = batch.get("decoder_attention_mask")
        if mask is None and labels is not None and labels.dim() == 2:
            mask = labels != IGNORED
    else:
        mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
