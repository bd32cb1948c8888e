"""How far a model is from its teacher, for each row of a batch."""

from __future__ import annotations

import torch
from torch import nn

from .counted_items import Counted, average

_EPSILON = 1e-12
_NEVER = -1e9  # a logit of no probability, and finite, so that differences of two are


def compare_logits(
    model: torch.Tensor,
    teacher: torch.Tensor,
    counted: Counted,
    *,
    problem: str | None,
    temperature: float,
    over_positions: bool = False,
) -> torch.Tensor:
    """The divergence of a model's predictions from its teacher's, times the square of the temperature.

    That square keeps the gradients as large as they are without a temperature: Hinton et al., arXiv 1503.02531.

    Args:
        model: Logits of shape `[rows, ..., classes]`, or `[rows, classes, height, width]`.
        teacher: The same of the teacher.
        counted: What counts; positions without a label do not.
        problem: The `problem_type` of the config; for a regression, and wherever there is one output, the squared
            difference is taken, for several labels a divergence for each.
        temperature: What both are divided by.
        over_positions: Whether the classes are the positions; those that are padding are none then.

    Returns:
        Averages of shape `[rows]`.
    """
    if model.dim() == 4:
        model, teacher = model.movedim(1, -1), teacher.movedim(1, -1)
    attended = counted.attended
    if over_positions and attended is not None and attended.shape == model.shape:
        model, teacher = (logits.float().masked_fill(~attended, _NEVER) for logits in (model, teacher))
        return _diverge(model, teacher, problem, temperature)
    mask = counted.positions
    if mask is not None and model.shape[:-1] == mask.shape:  # nothing is computed for what does not count
        values = _diverge(model[mask], teacher[mask], problem, temperature)
        whole = values.new_zeros(mask.shape).masked_scatter(mask, values)
        return average(whole, mask) if mask.dim() > 1 else whole
    return average(_diverge(model, teacher, problem, temperature), counted.attended)


def compare_embeddings(model: torch.Tensor, teacher: torch.Tensor, counted: Counted) -> torch.Tensor:
    """Squared difference, relative to the teacher's square, plus one minus the cosine.

    Args:
        model: Of shape `[rows, width]` for sentences, `[rows, length, width]` for tokens.
        teacher: The same of the teacher.
        counted: What counts; padding does not.

    Returns:
        Averages of shape `[rows]`.
    """
    model, teacher = model.float(), teacher.float()
    values = _relative_square(model, teacher) + 1 - nn.functional.cosine_similarity(model, teacher, dim=-1)
    return average(values, counted.attended)


def compare_hidden(model: torch.Tensor, teacher: torch.Tensor, counted: Counted) -> torch.Tensor:
    """Squared difference of hidden states, relative to the teacher's square at each position.

    So it means the same in every layer of every model, and single positions with huge states do not drown the others.

    Args:
        model: Of shape `[rows, length, width]`; any other is taken as one vector for each row.
        teacher: The same of the teacher.
        counted: What counts; padding does not.

    Returns:
        Averages of shape `[rows]`.
    """
    if model.dim() != 3:
        model, teacher = model.flatten(1), teacher.flatten(1)
    return average(_relative_square(model.float(), teacher.float()), counted.attended)


def compare_squares(model: torch.Tensor, teacher: torch.Tensor, counted: Counted) -> torch.Tensor:
    """Mean squared difference over everything but padding, as it is.

    Args:
        model: Of shape `[rows, length, width]`.
        teacher: The same of the teacher.
        counted: What counts; padding does not.

    Returns:
        Averages of shape `[rows]`.
    """
    return average((model.float() - teacher.float()).square().mean(-1), counted.attended)


def _diverge(model: torch.Tensor, teacher: torch.Tensor, problem: str | None, temperature: float) -> torch.Tensor:
    """The divergence over the last dimension."""
    model, teacher = model.float(), teacher.float()
    if problem == "regression" or model.shape[-1] == 1:
        return (model - teacher).square().mean(-1)
    model, teacher = model / temperature, teacher / temperature
    if problem == "multi_label_classification":
        model, teacher = (torch.stack((logits, torch.zeros_like(logits)), -1) for logits in (model, teacher))
    told, known = model.log_softmax(-1), teacher.log_softmax(-1)
    values = temperature**2 * nn.functional.kl_div(told, known, reduction="none", log_target=True).sum(-1)
    return values.mean(-1) if problem == "multi_label_classification" else values


def _relative_square(model: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (model - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=_EPSILON)
