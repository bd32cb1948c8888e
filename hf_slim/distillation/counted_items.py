"""Which rows and positions of a batch count, and how much, so that gradient accumulation changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .watched_calls import Call

_IGNORED = -100


class Counted(NamedTuple):
    """What counts in the batch of one call.

    Args:
        rows: How many items of the task's loss each row has, of shape `[rows]`; None where that is one each.
        positions: The positions that have a label that counts, of the labels' shape; None without such labels.
        attended: The positions that are no padding, of shape `[rows, length]`; None where nothing says so.
        targets: The shape of labels that are numbers with a decimal point; None of others.
    """

    rows: torch.Tensor | None
    positions: torch.Tensor | None
    attended: torch.Tensor | None
    targets: torch.Size | None = None


def count_items(call: Call, labels: Any) -> Counted:
    """Find what counts in a call.

    Args:
        call: A call of the model that is trained.
        labels: Those of the batch; what the call itself was given goes before them.

    Returns:
        What counts. The number of items is that which the Trainer counts for the losses of transformers.
    """
    found = next((c for c in call.walk() if c.kwargs.get("labels") is not None), None)
    shifted = next((c.kwargs["shift_labels"] for c in call.walk() if c.kwargs.get("shift_labels") is not None), None)
    inputs = {**(call.args[0] if call.args and isinstance(call.args[0], Mapping) else {}), **call.kwargs}
    mask = inputs.get("attention_mask")
    attended = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    labels = found.kwargs["labels"] if found is not None else labels
    if isinstance(shifted, torch.Tensor):
        labels = shifted
    elif isinstance(labels, torch.Tensor) and labels.dim() > 1 and shifts_labels(call.module):
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    if not isinstance(labels, torch.Tensor) or not labels.dim():
        return Counted(None, None, attended)
    counted = labels.ne(_IGNORED)
    rows = counted.flatten(1).sum(1) if counted.dim() > 1 else counted.long()
    if labels.is_floating_point():
        return Counted(rows, None, attended, labels.shape)
    return Counted(rows, counted, attended)


def average(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Average over everything but the rows.

    Args:
        values: Of shape `[rows, ...]`.
        mask: Of shape `[rows, length]`, which positions to take if the values have such; None for all.

    Returns:
        Of shape `[rows]`; 0 for a row of which nothing is taken.
    """
    if mask is not None and values.shape == mask.shape:
        return values.where(mask, 0).sum(1) / mask.sum(1).clamp(min=1)
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def weigh(values: torch.Tensor, rows: torch.Tensor | None, total: torch.Tensor | float | None) -> torch.Tensor:
    """Average over rows as the loss of the task does.

    Args:
        values: One for each row.
        rows: How many items each row of the batch has; one each if not given.
        total: The items of all batches that are accumulated; those of this batch if not given.

    Returns:
        The sum over rows of value times items, over the total.
    """
    if rows is None:
        rows = torch.ones(len(values), device=values.device)
    elif len(rows) != len(values) and len(values) % len(rows) == 0:  # several sequences a row, as in multiple choice
        values = values.view(len(rows), -1).mean(1)
    elif len(rows) != len(values):
        rows = rows.float().mean().expand(len(values))
    rows = rows.to(values)
    total = rows.sum() if total is None else torch.as_tensor(total, device=values.device)
    return (values * rows).sum() / total.clamp(min=1)


def make_probe(total: torch.Tensor | float) -> torch.Tensor:
    """The same number as a tensor of which `depends_on` tells whether a loss was made from it."""
    return torch.as_tensor(total).detach().to(torch.float32, copy=True).requires_grad_()


def depends_on(loss: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether a loss was divided by a number, or made from it in any other way.

    Many models of transformers take `num_items_in_batch` and leave it unused, so that only the graph tells.

    Args:
        loss: The loss, with its graph.
        probe: What `make_probe` gave.

    Returns:
        Whether the graph holds it.
    """
    found, seen = [loss.grad_fn], {loss.grad_fn}
    for node in found:
        if getattr(node, "variable", None) is probe:
            return True
        following = {other for other, _ in getattr(node, "next_functions", ())} - seen
        seen |= following
        found += following
    return False


def shifts_labels(module: nn.Module) -> bool:
    """Whether the loss of a model compares the label of each position with what the position before it says."""
    model: Any = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    if model is None or getattr(model.config, "is_encoder_decoder", False):
        return False
    if model.loss_type in LOSS_MAPPING:
        return LOSS_MAPPING[model.loss_type] is ForCausalLMLoss
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
