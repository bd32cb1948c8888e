"""How much a change of weights changes what a model gives, so that layers can be ranked together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..proof import find_tensors
from .calibration_batches import cut_batch, has_decoder, naming_batch
from .input_moments import find_mask

_TOKENS = 1024
"""So many tokens are enough to see how a layer's error shows in the outputs."""


class OutputError:
    """Compares what a model gives now with what it gave at first, where it is not padding.

    Args:
        model: The model, in evaluation mode.
        batch: A batch on its device; so many samples of it are run that there are about a thousand tokens, or all
            where it cannot be cut.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """See the class."""
        ids = batch.get("input_ids")
        rows = max(1, _TOKENS // max(1, ids.shape[1])) if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None
        self._model, self._batch = model, dict(batch) if rows is None else cut_batch(batch, rows)
        with naming_batch(model, batch, 0):
            self._outputs = self._run()

    @torch.no_grad()
    def measure(self) -> float:
        """The squared error of each output relative to its squares, summed over the outputs."""
        total = 0.0
        for name, now in self._run().items():
            rows = zip(self._select(name, self._outputs[name]), self._select(name, now), strict=True)
            squares = [_compare(*row) for row in rows]
            error, scale = (sum(part) for part in zip(*squares, strict=True))
            total += error / scale if scale else 0.0
        return total

    def _select(self, name: str, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """An output of each sample, without the positions that are padding."""
        mask = find_mask(self._batch, decoded=has_decoder(self._model) and not name.startswith("encoder"))
        if mask is None or values.shape[:2] != mask.shape:
            return iter(values.unbind())
        return (row[where] for row, where in zip(values, mask.to(values.device), strict=True))

    @torch.no_grad()
    def _run(self) -> dict[str, torch.Tensor]:
        found = dict(find_tensors(self._model(**self._batch), ""))
        return {name: value for name, value in found.items() if value.dim()}  # but for a loss


def _compare(before: torch.Tensor, now: torch.Tensor) -> tuple[float, float]:
    """The squared error and the squares, without what masks are filled with, which is no result."""
    finite = before.isfinite() & now.isfinite()
    error = torch.where(finite, now - before, 0).float().square().sum()
    return float(error), float(torch.where(finite, before, 0).float().square().sum())
