"""SlimTrainerCallback: scores, selects and drops units while a Trainer trains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..arguments import SlimConfig, refuse_two_settings
from ..parallel import find_fixed_shapes, refuse_strategy
from .attached_optimizer import refuse_attached
from .plan import from_state, to_state
from .saved_state import check_saved
from .slimmer import Slimmer

logger = logging.get_logger(__name__)


class SlimTrainerCallback(TrainerCallback, ExportableState):
    """Raises the sparsity of FFN2 columns and attention heads on a schedule during `Trainer.train`.

    Args:
        config: Nothing, to read the fields of the `SlimTrainingArguments`; a `SlimConfig`, beside any other arguments;
            or the list that `parse_auto_slim_config` returns.

    Attributes:
        slimming: The state of the training in progress or the last one; None before.
    """

    def __init__(self, config: SlimConfig | Sequence[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """See the class."""
        self.config = from_state(config)
        self.saved: dict[str, Any] | None = None  # set by the Trainer when it restores callbacks; read by nobody
        self.processes = 1
        self._trained: Callable[[], nn.Module | None] = lambda: None
        self.slimming: Slimmer | None = None
        self.trainer: Any = None  # while it trains
        self._scale: torch.Tensor | None = None  # the loss scale (fp16) before the optimizer step

    def restore_zeros(self, model: nn.Module) -> None:
        """Write zeros again where something has written over them since the training, in the model that was trained.

        Args:
            model: The trainer's model; left alone if it is another one by now.
        """
        if self.slimming is not None and self._is_trained(model):
            self.slimming.restore_zeros(model)

    def find_masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The masks, True = keep, of the units that are in the trainer's model; none if it is not the one trained."""
        return self.slimming.masks_left if self.slimming is not None and self._is_trained(model) else {}

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """For each structure's name a boolean tensor of shape `[units]`, True = keep; empty before training.

        The units are those that the model had before anything was dropped.
        """
        return self.slimming.masks if self.slimming is not None else {}

    def state(self) -> dict[str, Any]:
        """What the Trainer saves in `trainer_state.json`: settings, schedule, dropped units and smoothed scores."""
        saved = self.slimming.to_state() if self.slimming is not None else None
        return {
            "args": {"config": to_state(self.config)},
            "attributes": {"saved": saved, "processes": self.processes},
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings that are also in the arguments, but otherwise."""
        refuse_two_settings(args, self.config)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the settings against the model and the run; start, or take up what the checkpoint holds."""
        if self.slimming is not None:
            self.slimming.close()
        self.slimming = None
        self._trained = weakref.ref(model)
        refuse_attached(model)
        refuse_two_settings(args, self.config)  # again, since a hyperparameter search changes the arguments
        refuse_strategy(model, args)
        self.processes = args.world_size
        settings = SlimConfig.from_arguments(args) if self.config is None else self.config
        name = type(self).__name__
        saved = find_saved(state.stateful_callbacks, name) if state.global_step > 0 else None
        if state.global_step > 0 and saved is None:
            logger.warning(
                f"The checkpoint of step {state.global_step} holds no slimming state: the schedule starts there, with "
                "nothing dropped so far and fractions counted of the steps that remain."
            )
        begin = state.global_step if saved is None else 0
        self.slimming = Slimmer(
            model,
            settings,
            state.max_steps,
            begin=begin,
            saved=saved,
            optimizer=optimizer,
            obstacle=find_fixed_shapes(model, args),
            find_others=self._find_others,
        )
        if not self.slimming.plan.targets:
            warnings.warn(
                "SlimTrainerCallback has nothing to do: ffn2_sparsity and mha_sparsity are both 0, and no budget is "
                "given.",
                stacklevel=2,
            )
        others = [key for key, stored in state.stateful_callbacks.items() if key != name and _is_state(stored)]
        for other in others:  # what this goes on from, by a class of another name
            del state.stateful_callbacks[other]
        state.stateful_callbacks[name] = self.state()
        if not self.slimming.has_reached_target:
            _forget_best(state)
            if args.metric_for_best_model is not None:
                logger.info(
                    f"The best model is sought from step {self.slimming.plan.last_step} on, at the final sparsity."
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Keep the batch, if units will leave the model at the end of the step."""
        called = self.trainer.model_wrapped if self.trainer is not None and args.torch_compile else None
        self._running.watch(model, state.global_step + 1, called)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Score the units from the gradients of this step."""
        if self._running.has_reached_target:
            return
        self._scale = _loss_scale(optimizer, args.device)
        self._running.score(model, state.global_step + 1, may_be_skipped=self._scale is not None)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Drop units if it is time, and keep dropped ones out."""
        step = state.global_step + 1
        if not self._running.has_reached_target:
            _forget_best(state)
            skipped = _was_skipped(optimizer, self._scale)
            self._running.advance(model, optimizer, step, skipped=skipped)
            if self._running.has_reached_target and args.metric_for_best_model is not None:
                logger.info(f"The final sparsity is reached at step {step}; the best model is sought from here on.")
        else:
            self._running.advance(model, optimizer, step, skipped=True)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the zeros before an evaluation or a checkpoint."""
        if control.should_evaluate or control.should_save:
            self._running.restore_zeros(model, optimizer)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the zeros; no evaluation from before the final sparsity is a best one, or one to compare with."""
        if control.should_evaluate or control.should_save:
            self._running.restore_zeros(model, optimizer)
        if not self._running.has_reached_target:
            _forget_best(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """No checkpoint from before the final sparsity is the best one."""
        if not self._running.has_reached_target:
            _forget_best(state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the zeros; say so if training ended before the schedule did."""
        self._running.close()
        self._running.restore_zeros(model, optimizer)
        if not self._running.has_reached_target:
            logger.warning(
                f"Training ended at step {state.global_step}, before the last pruning step, "
                f"{self._running.plan.last_step}: the sparsities reached are {self.sparsities()}."
            )

    def sparsities(self) -> dict[str, float]:
        """The sparsity in force.

        Returns:
            `ffn2_sparsity` and `mha_sparsity`: the fractions of the units of the structures in the schedule that are
            dropped; 0 where none are scheduled.
        """
        return self._running.sparsities()

    def _is_trained(self, model: nn.Module) -> bool:
        """Whether a model is the one that was trained, with the tensors that it had at the end."""
        return self._trained() is model and self.slimming is not None and self.slimming.shape.fits(model, is_same=True)

    @property
    def _running(self) -> Slimmer:
        if self.slimming is None:
            raise RuntimeError("SlimTrainerCallback is not in a training: it was added after training began.")
        return self.slimming

    def _find_others(self) -> list[TrainerCallback]:
        """The other callbacks that there are now, if the trainer is known."""
        known = self.trainer.callback_handler.callbacks if self.trainer is not None else []
        return [callback for callback in known if callback is not self]


def refuse_several(callbacks: Iterable[TrainerCallback]) -> None:
    """Refuse a trainer with more than one `SlimTrainerCallback`, whichever classes are made of it.

    Args:
        callbacks: Those of the trainer.

    Raises:
        ValueError: If there are two.
    """
    if sum(isinstance(callback, SlimTrainerCallback) for callback in callbacks) > 1:
        raise ValueError(
            "The trainer has more than one SlimTrainerCallback, and each would drop units of the same model: keep "
            "one, and give it all settings."
        )


def find_saved(callbacks: Mapping[str, Any] | None, name: str | None = None) -> dict[str, Any] | None:
    """What a checkpoint holds of the callback.

    Args:
        callbacks: The field `stateful_callbacks` of the checkpoint's `trainer_state.json`.
        name: The callback's class, where it is known; a checkpoint made by a class of another name is read, too.

    Returns:
        What `Slimmer.to_state` gave; None if the run was not slimmed.

    Raises:
        ValueError: If it is not as it was written.
    """
    stored = find_state(callbacks, name)
    attributes = stored.get("attributes") if isinstance(stored, dict) else None
    saved = attributes.get("saved") if isinstance(attributes, dict) else stored
    if saved is not None:
        check_saved(saved)
    return saved


def find_state(callbacks: Mapping[str, Any] | None, name: str | None = None) -> Any:
    """What `SlimTrainerCallback.state` or that of a subclass gave, among the states of all callbacks.

    Args:
        callbacks: The field `stateful_callbacks` of a checkpoint's `trainer_state.json`.
        name: The callback's class, where it is known.

    Returns:
        What is kept under the name; else under that of the base class; else what has its form, or None.
    """
    callbacks = callbacks or {}
    for known in (name, SlimTrainerCallback.__name__):
        if known is not None and known in callbacks:
            return callbacks[known]
    return next((stored for stored in callbacks.values() if _is_state(stored)), None)


def _is_state(stored: Any) -> bool:
    attributes = stored.get("attributes") if isinstance(stored, dict) else None
    return isinstance(attributes, dict) and {"saved", "processes"} <= attributes.keys()


def add_sparsities(callbacks: Iterable[TrainerCallback], state: TrainerState, logs: dict[str, Any]) -> None:
    """Add the sparsities to an entry of the log that holds the training loss.

    Args:
        callbacks: Those of the trainer.
        state: The trainer's state, the last entry of whose history is the same one.
        logs: The entry; changed in place.
    """
    for callback in callbacks:
        if (
            isinstance(callback, SlimTrainerCallback)
            and callback.slimming is not None
            and callback.slimming.plan.targets
            and "loss" in logs
        ):
            logs.update(callback.sparsities())
            state.log_history[-1].update(callback.sparsities())


def _loss_scale(optimizer: Any, device: torch.device) -> torch.Tensor | None:
    """The loss scale on the device: asking the scaler for the number would wait for it."""
    scaler = getattr(optimizer, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def _was_skipped(optimizer: Any, scale_before: torch.Tensor | None) -> bool | torch.Tensor:
    """Whether gradients overflowed; fused optimizers skip in their kernel, and only the lower loss scale tells."""
    if getattr(optimizer, "step_was_skipped", False):
        return True
    if scale_before is None:
        return False
    scale = _loss_scale(optimizer, scale_before.device)
    lowered = False if scale is None else scale < scale_before
    return bool(lowered) if scale_before.device.type == "cpu" else lowered


def _forget_best(state: TrainerState) -> None:
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
