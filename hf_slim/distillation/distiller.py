"""A model's loss to its teacher: what both say of a batch, compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..arguments import SlimConfig
from ..compaction import find_pretrained
from ..structures import get_module
from .counted_items import Counted, count_items, weigh
from .differences import compare_embeddings, compare_hidden, compare_logits, compare_squares
from .kept_outputs import Inputs, KeptOutputs
from .signals import EMBEDDINGS, LAST_HIDDEN, POSITION_LOGITS, Signals, find_arguments, find_signals
from .teachers import check_teacher, refuse_other_size
from .watched_calls import Call, watch_calls


class Distiller:
    """Asks a teacher what it says of a batch, and compares that with what the model said.

    Args:
        teacher: The teacher, in the type that is asked for; it is put into evaluation mode.
        model: The model that is trained.
        settings: The weights, and what is compared.
        autocast: Gives the context in which the teacher computes.

    Attributes:
        teacher: The teacher.
        kept: What it said of the rows so far, if that is kept.

    Raises:
        ValueError: If the teacher does not fit the model.
    """

    def __init__(
        self,
        teacher: nn.Module,
        model: nn.Module,
        settings: SlimConfig,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """See the class."""
        check_teacher(teacher, model)
        self._last = settings.slim_distill_from == "last_hidden"
        self._hidden = not self._last and settings.slim_hidden_weight > 0
        if self._hidden:
            refuse_other_size(teacher, model, "num_hidden_layers", "another depth than")
        if self._hidden or self._last:
            refuse_other_size(teacher, model, "hidden_size", "hidden states of another size than")
        name = settings.slim_teacher_dtype
        self._dtype: torch.dtype | None = None if name is None else getattr(torch, name)
        self.teacher = teacher.eval()
        self.kept = KeptOutputs() if settings.slim_cache_teacher else None
        self._parts = find_pretrained(model)
        if self.kept is not None and any(part.config.is_encoder_decoder for part in self._parts):
            raise ValueError(
                f"slim_cache_teacher does not work with encoder-decoder models such as {type(model).__name__}, whose "
                "rows have two lengths: leave it off."
            )
        self._settings, self._model, self._autocast = settings, model, autocast

    def watch(
        self, called: nn.Module | None = None, total: torch.Tensor | None = None
    ) -> AbstractContextManager[list[Call]]:
        """See how the model is called while the loss of the task is computed.

        Args:
            called: What stands for the model where it is called.
            total: What models are given in place of any `num_items_in_batch`.

        Returns:
            A context that gives the calls.
        """
        return watch_calls(self._model, called, hidden=self._hidden or self._last, total=total)

    def combine(self, task: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """The loss that is trained: that of the task and that to the teacher, weighted."""
        weight = self._settings.slim_distill_weight
        return (1 - weight) * task + weight * distance

    def measure(
        self, calls: list[Call], labels: Any = None, total: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """How far the model was from the teacher.

        Args:
            calls: What `watch` gave.
            labels: The labels of the batch, if the model was called without.
            total: The labels that count in all batches that are accumulated, if the task's loss is divided by them.

        Returns:
            The mean over the calls, with a graph.

        Raises:
            ValueError: If model and teacher do not say the same kind of thing.
        """
        if not calls:
            raise ValueError(
                f"The loss does not call {type(self._model).__name__} with gradients, so that there is nothing to "
                "compare with the teacher: take a loss that does (none of those that cache gradients), or no teacher."
            )
        return torch.stack([self._measure(call, labels, total) for call in calls]).mean()

    def _measure(self, call: Call, labels: Any, total: torch.Tensor | float | None) -> torch.Tensor:
        said = find_signals(call, hidden=self._hidden, last=self._last)
        known = self._ask(call)
        self._check(said, known)
        counted = count_items(call, labels)
        values: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for name, tensor in said.items():
            is_hidden = name == LAST_HIDDEN or "hidden_states." in name
            value = weigh(self._compare(name, tensor, known[name], counted), counted.rows, total)
            values[is_hidden].append(value)
        weights = {False: 1.0, True: self._settings.slim_hidden_weight}
        return torch.stack([weights[is_hidden] * torch.stack(v).mean() for is_hidden, v in values.items() if v]).sum()

    def _compare(self, name: str, model: torch.Tensor, teacher: torch.Tensor, counted: Counted) -> torch.Tensor:
        if name == LAST_HIDDEN:
            return compare_squares(model, teacher, counted)
        if name in EMBEDDINGS:
            return compare_embeddings(model, teacher, counted)
        if "hidden_states." in name:
            return compare_hidden(model, teacher, counted)
        problems = (getattr(part.config, "problem_type", None) for part in self._parts)
        problem = next(problems, None)
        if problem is None and model.dim() == 2 and counted.targets == model.shape:  # as transformers takes them
            problem = "multi_label_classification"
        temperature = self._settings.slim_temperature
        return compare_logits(
            model, teacher, counted, problem=problem, temperature=temperature, over_positions=name in POSITION_LOGITS
        )

    def _ask(self, call: Call) -> Signals:
        """What the teacher says of what the model was given."""
        try:
            asked = get_module(self.teacher, call.path)
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"The loss calls {call.path} of the model, and the teacher, a {type(self.teacher).__name__}, has none."
            ) from error
        inputs: Inputs = (call.args, find_arguments(call))
        if self.kept is None:
            return self._run(asked, inputs)
        return self.kept.find(inputs, lambda some: self._run(asked, some))

    @torch.no_grad()
    def _run(self, asked: nn.Module, inputs: Inputs) -> Signals:
        args, kwargs = tree_map(self._narrow, inputs)
        with self._autocast(), watch_calls(asked, hidden=self._hidden or self._last) as calls:
            try:
                asked(*(dict(arg) if isinstance(arg, dict) else arg for arg in args), **kwargs)
            except TypeError as error:
                raise ValueError(
                    f"The teacher, a {type(asked).__name__}, cannot be called as the {type(self._model).__name__} "
                    f"that is trained: {error}"
                ) from error
        return find_signals(calls[0], hidden=self._hidden, last=self._last)

    def _narrow(self, value: Any) -> Any:
        is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_number and self._dtype is not None else value

    def _check(self, said: Signals, known: Signals) -> None:
        for name, tensor in said.items():
            other = known.get(name)
            if other is None or other.shape != tensor.shape:
                shape = "nothing of that name" if other is None else tuple(other.shape)
                raise ValueError(
                    f"The teacher, a {type(self.teacher).__name__}, gives {name} of another shape than the model that "
                    f"is trained: {shape} and {tuple(tensor.shape)}. It has another vocabulary, number of labels, "
                    "depth or size, or one of the two has tokens that the other has not, such as the virtual tokens "
                    "of prompt tuning: take one with the same."
                )
            if not tensor.requires_grad:
                raise ValueError(
                    f"{name} of the model has no gradient, so that nothing would be learnt from the teacher. With "
                    "gradient checkpointing, pass gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
