"""The importance scores of a training: taken at every step, smoothed, refused where they are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import reduce
from torch import nn

from ..arguments import CriterionName
from ..parallel import Shards
from ..structures import Structure, get_tensor
from .importance import LONG_SMOOTHING, SMOOTHING, score_structures, smooth_scores

Groups = Mapping[CriterionName, Sequence[Structure]]
"""For each criterion the structures that are scored by it, as they are in the model."""


class Scores:
    """Smoothed scores, and those of the step that is being taken.

    Args:
        shards: Where the model's weights and gradients are.

    Attributes:
        smoothed: For each structure's name the scores of the units that are in the model.
    """

    def __init__(self, shards: Shards) -> None:
        """See the class."""
        self.smoothed: dict[str, torch.Tensor] = {}
        self._shards = shards
        self._pending: dict[str, torch.Tensor] = {}
        self._squared: set[str] = set()  # the names of the structures whose scores are squares
        self._is_checked = False  # whether the pending scores are known to be finite
        self._taken: int | torch.Tensor = 0  # above 0 from the first step whose scores count
        self._bad_step: torch.Tensor | None = None  # the first step with a score that is not finite, 0 for none

    def take(self, model: nn.Module, groups: Groups, step: int = 0) -> None:
        """Score the units from the gradients of a step that is about to be taken.

        Args:
            model: The model, with gradients.
            groups: The structures.
            step: The optimizer step, counted from 1.

        Raises:
            RuntimeError: If no gradient is there.
        """
        self._pending, self._is_checked = {}, False
        self._squared = {s.name for s in groups.get("fisher", ())}
        for criterion, structures in groups.items():
            if not self._shards.scores_before_step:
                _require_gradients(model, structures, step)
            self._pending.update(score_structures(model, structures, criterion, self._shards))

    def unscale(self, scale: torch.Tensor) -> None:
        """Divide the scores of this step by the loss scale that is still in its gradients.

        Args:
            scale: One number, on any device.
        """
        self._multiply(1 / scale)

    def check(self, step: int) -> None:
        """Refuse scores of this step that are not finite; only on the CPU, since a device would have to be waited for.

        Args:
            step: The optimizer step, counted from 1.

        Raises:
            RuntimeError: If one is NaN or infinite.
        """
        if all(scores.device.type == "cpu" for scores in self._pending.values()):
            refuse_nonfinite(self._pending, step)
            self._is_checked = True

    def count(self, step: int, skipped: bool | torch.Tensor) -> None:
        """Take the scores of a step into account; on a device without waiting for it.

        Args:
            step: The optimizer step, counted from 1.
            skipped: Whether the optimizer skipped the step, so that its scores do not count; where only the device
                knows, a boolean tensor there.

        Raises:
            RuntimeError: If a score on the CPU is NaN or infinite.
        """
        if skipped is not True and self._pending:
            self._smooth(step, skipped)
        self._pending = {}

    def can_select(self) -> bool:
        """Whether the scores of any step have counted; in fp16 none has as long as all were skipped."""
        return bool(int(self._taken))

    def take_up(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Go on with the smoothed scores of a checkpoint.

        Args:
            scores: For each structure's name the scores of the units that are in the model.
        """
        self.smoothed.update(scores)
        self._taken = len(self.smoothed)

    def refuse_bad_step(self) -> None:
        """Refuse to go on after a step with scores that were not finite.

        Raises:
            RuntimeError: If there was one.
        """
        if self._bad_step is not None and int(self._bad_step):
            refuse_nonfinite(self.smoothed, int(self._bad_step))

    def _multiply(self, factor: torch.Tensor) -> None:
        """Multiply the gradients by a number after they were scored: squares of them by its square."""
        for name, scores in self._pending.items():
            self._pending[name] = scores * factor.to(scores.device) ** (2 if name in self._squared else 1)

    def _smooth(self, step: int, skipped: bool | torch.Tensor) -> None:
        if (factor := self._shards.clip_factor()) < 1:
            self._multiply(torch.tensor(factor))
        counted = skipped.logical_not() if isinstance(skipped, torch.Tensor) else None
        first = next(iter(self._pending.values()))
        if first.device.type == "cpu":
            if not self._is_checked:
                refuse_nonfinite(self._pending, step)
        else:
            together = torch.cat([scores.to(first.device) for scores in self._pending.values()])
            bad = torch.isfinite(together).all().logical_not()
            bad = (bad if counted is None else bad.logical_and(counted)).mul(step)
            before = torch.zeros_like(bad) if self._bad_step is None else self._bad_step
            self._bad_step = torch.where(before.eq(0), bad, before)
        for name, scores in self._pending.items():
            smoothing = LONG_SMOOTHING if name in self._squared else SMOOTHING
            smoothed = smooth_scores(self.smoothed.get(name), scores, smoothing)
            if counted is not None:
                kept = self.smoothed.get(name, torch.zeros_like(scores)).to(scores.device)
                smoothed = torch.where(counted.to(scores.device), smoothed, kept)
            self.smoothed[name] = smoothed
        self._taken = 1 if counted is None else counted.add(self._taken)


def agree_on(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean of scores over all processes, so that every one selects the same units.

    Args:
        scores: For each structure's name its scores in this process.

    Returns:
        The means.
    """
    first = next(iter(scores.values()))
    together = reduce(torch.cat([values.to(first.device) for values in scores.values()]), "mean")
    return dict(zip(scores, together.split([len(values) for values in scores.values()]), strict=True))


def refuse_nonfinite(scores: Mapping[str, torch.Tensor], step: int) -> None:
    """Refuse scores that are not finite.

    Args:
        scores: For each structure's name its scores.
        step: The optimizer step, counted from 1.

    Raises:
        RuntimeError: If one is NaN or infinite.
    """
    values = list(scores.values())
    if not values or torch.isfinite(torch.cat([v.to(values[0].device) for v in values])).all():
        return
    bad = [name for name, values in scores.items() if not torch.isfinite(values).all()]
    where = ", ".join(bad)
    if len(bad) == len(scores):
        where = f"all {len(bad)} structures (the Trainer's clipping spreads NaN from one gradient to every other)"
    raise RuntimeError(
        f"The importance scores are not finite at step {step}, in {where}: weights or gradients hold NaN or "
        "infinity. Lower the learning rate, or look at the loss and the batch of this step."
    )


def _require_gradients(model: nn.Module, structures: Sequence[Structure], step: int) -> None:
    if all(get_tensor(model, member.tensor).grad is None for s in structures for member in s.outputs):
        raise RuntimeError(
            f"At step {step} there is no gradient in any of the {len(structures)} structures that are to be scored. "
            "Optimizers that step during the backward pass (LOMO, layer-wise GaLore and Apollo) leave none: use "
            "another optimizer, or slim_criterion='magnitude'."
        )
