"""SlimTrainer: a Trainer whose model also learns from a teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from ..arguments import SlimArgumentsMixin, SlimConfig, find_teacher_fields
from ..training import SlimTrainerCallback
from .counted_items import depends_on, make_probe
from .distiller import Distiller
from .teachers import (
    DENSE,
    SELF,
    check_teacher,
    convert_teacher,
    copy_teacher,
    load_teacher,
    make_fingerprint,
    warn_untrained,
)

_STATE = "slim_teacher"
"""Under which name `trainer_state.json` holds what tells the teacher from another one."""


class SlimTrainerMixin:
    """Lets the model of any Trainer learn from a teacher, beside the loss that the Trainer computes.

    Put it first among the bases: `class MyTrainer(SlimTrainerMixin, SFTTrainer)`. The settings are the slimming fields
    of the arguments, or of the `SlimConfig` that a `SlimTrainerCallback` was given. If the arguments ask for a
    sparsity and there is no `SlimTrainerCallback`, one is added. The teacher is not saved, nor asked in evaluation.

    Args:
        *args: What the other class takes.
        teacher_model: The teacher, a model of the same kind, which is put into evaluation mode, moved to the trainer's
            device and left as it is otherwise (with `slim_teacher_dtype` a copy is taken); or nothing, and
            `slim_teacher` in the arguments names one.
        **kwargs: What the other class takes.

    Raises:
        ValueError: If the teacher is given twice, is the model itself, or does not fit it.
    """

    args: Any
    model: Any
    state: Any
    accelerator: Any

    def __init__(self, *args: Any, teacher_model: nn.Module | None = None, **kwargs: Any) -> None:
        """See the class."""
        super().__init__(*args, **kwargs)
        own: Any = self
        callbacks = own.callback_handler.callbacks
        has_ours = any(isinstance(callback, SlimTrainerCallback) for callback in callbacks)
        asks = isinstance(self.args, SlimArgumentsMixin) and (self.args.ffn2_sparsity or self.args.mha_sparsity)
        if asks and not has_ours:
            own.add_callback(SlimTrainerCallback())
        own.add_callback(TeacherCallback(self))
        self.teacher_model = teacher_model
        self._given_teacher = teacher_model
        self._distiller: Distiller | None = None
        self._losses = _Losses()
        self._is_asked = False
        self._divides: bool | None = None  # whether the task's loss is divided by what accumulated batches count
        settings = find_settings(self.args, callbacks)
        _refuse_names(settings, teacher_model)
        if teacher_model is not None and self.model is not None:
            check_teacher(teacher_model, self.model)
        own.compute_loss = functools.partial(self._teach, own.compute_loss)  # whichever class it is from

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as the other class does; "self" is the model as it is now, before a checkpoint is loaded."""
        own: Any = self
        self._distiller = None
        name = find_settings(self.args, own.callback_handler.callbacks).slim_teacher
        if self._given_teacher is None and name is not None and own.model_init is None:
            is_known = self.teacher_model is not None and bool(resume_from_checkpoint or name != SELF)
            if not is_known:
                self._take_teacher(name)
        parent: Any = super()
        return parent.train(resume_from_checkpoint, *args, **kwargs)

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """Make the model of a training or of a trial, and the teacher of it."""
        own: Any = self
        parent: Any = super()
        model = parent.call_model_init(*args, **kwargs)
        if getattr(self, "is_in_train", False) and self._given_teacher is None:
            name = find_settings(self.args, own.callback_handler.callbacks).slim_teacher
            if name is not None:
                self.model = model
                self._take_teacher(name)
        return model

    def _teach(self, compute: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss that the trainer computes, weighted with that to the teacher while the model is trained."""
        own: Any = self
        distiller = self._distiller
        if distiller is None or not torch.is_grad_enabled() or not own.is_in_train:
            return compute(model, inputs, *args, **kwargs)
        keywords = {**dict(zip(("return_outputs", "num_items_in_batch"), args, strict=False)), **kwargs}
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None  # which it may take out
        total = keywords.get("num_items_in_batch")
        total = None if getattr(self, "loss_is_scaled_for_ga", None) is False else total
        probe = None
        if total is not None and self._divides is None:
            probe = keywords["num_items_in_batch"] = make_probe(total)
        with distiller.watch(model, probe) as calls:
            result = compute(model, inputs, **keywords)
        self._is_asked = True
        task, *others = result if isinstance(result, tuple) else (result,)
        if probe is not None:
            self._divides = depends_on(task, probe)
        distance = distiller.measure(calls, labels, total if self._divides else None)
        if total is not None and self.args.average_tokens_across_devices:
            distance = distance * self.accelerator.num_processes  # whose gradients are averaged
        self._losses.add(task, distance, 1 if self._is_scaled(total) else own.current_gradient_accumulation_steps)
        loss = distiller.combine(task, distance.to(task.device))
        return (loss, *others) if isinstance(result, tuple) else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the two parts of the training loss where there is one: `task_loss` and `distill_loss`."""
        if "loss" in logs and self._distiller is not None:
            logs.update(self._losses.take(self.accelerator, self.state.global_step))
        parent: Any = super()
        parent.log(logs, *args, **kwargs)

    def begin_teaching(self, state: TrainerState) -> None:
        """Bring teacher and model together, when all that a training needs is there.

        Args:
            state: The trainer's, in which a checkpoint tells with which teacher it was made.

        Raises:
            ValueError: If they do not fit, or it is another teacher than that of the checkpoint.
        """
        own: Any = self
        stored = state.stateful_callbacks.get(_STATE)
        settings = find_settings(self.args, own.callback_handler.callbacks)
        if self.teacher_model is None:
            if asked := find_teacher_fields(settings):
                raise ValueError(
                    f"{', '.join(asked)}, but there is no teacher: name one as slim_teacher or pass teacher_model, or "
                    "leave what is about teachers at its defaults."
                )
            _refuse_forgotten(state)
            return
        if self.args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise ValueError(
                "A teacher does not work with nn.DataParallel, which the Trainer uses when one process sees several "
                "GPUs: start with torchrun or accelerate launch, or make one GPU visible."
            )
        autocast = self.accelerator.autocast
        teacher = self.teacher_model
        if settings.slim_teacher_dtype is not None:
            is_given = teacher is self._given_teacher  # which stays as it is
            teacher = convert_teacher(teacher, settings.slim_teacher_dtype, is_copied=is_given)
        fingerprint = make_fingerprint(teacher)
        if not hasattr(teacher, "hf_device_map"):
            teacher.to(self.args.device)
        self._distiller = Distiller(teacher, self.model, settings, autocast=autocast)
        if state.global_step > 0 and stored is not None and stored != {"fingerprint": fingerprint}:
            raise ValueError(
                f"The checkpoint of step {state.global_step} was trained with another teacher. Give the trainer the "
                "same teacher_model and slim_teacher_dtype; with slim_teacher='self' the model that the training "
                "began with, not that of the checkpoint. Where its head is made up anew each time, save it before, "
                "and name its folder."
            )
        state.stateful_callbacks[_STATE] = {"fingerprint": fingerprint}
        self._losses = _Losses(state.global_step)
        self._is_asked, self._divides = False, None

    def refuse_unasked(self) -> None:
        """Refuse a training that takes a step without asking its teacher.

        Raises:
            ValueError: If there is a teacher, and the loss of no batch was computed by `compute_loss`.
        """
        if self._distiller is not None and not self._is_asked:
            raise ValueError(
                f"The teacher was not asked: a step of {type(self).__name__} does not call the compute_loss that the "
                "trainer was built with. Let training_step call self.compute_loss, or put SlimTrainerMixin first: "
                "class My(SlimTrainerMixin, YourTrainer)."
            )

    def keep_no_more(self) -> None:
        """End the epoch whose rows are kept with what the teacher says of them."""
        if self._distiller is not None and self._distiller.kept is not None:
            self._distiller.kept.is_full = True

    def _take_teacher(self, name: str) -> None:
        self.teacher_model = copy_teacher(self.model) if name == SELF else load_teacher(name, self.model)
        warn_untrained(self.teacher_model, self.model if name == SELF else self.teacher_model)

    def _is_scaled(self, total: Any) -> bool:
        """Whether the Trainer takes the loss as divided by what all accumulated batches count."""
        own: Any = self
        return (own.model_accepts_loss_kwargs and total is not None) or own.compute_loss_func is not None


class SlimTrainer(SlimTrainerMixin, Trainer):
    """`Trainer` whose model also learns from a teacher: see `SlimTrainerMixin`."""


class TeacherCallback(TrainerCallback):
    """Tells a trainer with a teacher when its training begins.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: SlimTrainerMixin) -> None:
        """See the class."""
        self.trainer = trainer
        self._epochs = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring teacher and model together."""
        self._epochs = 1 if state.global_step == 0 else 2  # the rest of one, and a whole one
        self.trainer.begin_teaching(state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a training that does not ask its teacher."""
        self.trainer.refuse_unasked()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep no more rows."""
        self._epochs -= 1
        if self._epochs == 0:
            self.trainer.keep_no_more()


class _Losses:
    """The sums of both losses since the last entry of the log.

    Args:
        step: The optimizer step after which they begin.
    """

    def __init__(self, step: int = 0) -> None:
        self._step = step
        self._sums: torch.Tensor | None = None

    def add(self, task: torch.Tensor, distance: torch.Tensor, divisor: int) -> None:
        parts = torch.stack((task.detach().float().mean(), distance.detach().float())) / divisor
        self._sums = parts if self._sums is None else self._sums + parts

    def take(self, accelerator: Any, step: int) -> dict[str, float]:
        if self._sums is None or step == self._step:
            return {}
        sums = accelerator.gather(self._sums[None]).mean(0) / (step - self._step)
        self._step, self._sums = step, None
        task, distance = sums.tolist()
        return {"task_loss": task, "distill_loss": distance}


def find_settings(arguments: Any, callbacks: Iterable[TrainerCallback]) -> SlimConfig:
    """The slimming fields that hold for a trainer.

    Args:
        arguments: Those of the trainer.
        callbacks: Those of the trainer.

    Returns:
        The `SlimConfig` that a `SlimTrainerCallback` was given, else the fields of the arguments, else the defaults.
    """
    for callback in callbacks:
        if isinstance(callback, SlimTrainerCallback) and isinstance(callback.config, SlimConfig):
            return callback.config
    return SlimConfig.from_arguments(arguments) if isinstance(arguments, SlimArgumentsMixin) else SlimConfig()


def refuse_untaught(arguments: Any, callbacks: Iterable[TrainerCallback], state: TrainerState) -> None:
    """Refuse settings that are about a teacher, and checkpoints made with one, where nothing would ask one.

    Args:
        arguments: Those of a trainer.
        callbacks: Those of the trainer.
        state: That of the trainer, in which a checkpoint tells with which teacher it was made.

    Raises:
        ValueError: If a field about teachers is not at its default, or the checkpoint was made with a teacher, and the
            trainer has no `SlimTrainerMixin`.
    """
    callbacks = list(callbacks)
    if any(isinstance(callback, TeacherCallback) for callback in callbacks):
        return
    _refuse_forgotten(state)
    asked = find_teacher_fields(find_settings(arguments, callbacks))
    if asked:
        raise ValueError(
            f"{', '.join(asked)}, but the trainer asks no teacher, so nothing would be learnt from it: train with "
            "SlimTrainer, or with class My(SlimTrainerMixin, YourTrainer)."
        )


def _refuse_forgotten(state: TrainerState) -> None:
    if state.global_step > 0 and _STATE in state.stateful_callbacks:
        raise ValueError(
            f"The checkpoint of step {state.global_step} was trained with a teacher, and this trainer has none. "
            "Resume with a SlimTrainer (or SlimTrainerMixin) that is given the same teacher_model or slim_teacher; to "
            "go on without, load the checkpoint's model with from_pretrained and begin a new training."
        )


def _refuse_names(settings: SlimConfig, teacher_model: Any) -> None:
    if settings.slim_teacher is not None and teacher_model is not None:
        raise ValueError(
            f"The teacher is given twice, as teacher_model and as slim_teacher={settings.slim_teacher!r}: give one."
        )
    if settings.slim_teacher == DENSE:
        raise ValueError(
            "slim_teacher='dense' is for `hf-slim run`, which trains the dense model, too. Train it, and pass it as "
            "teacher_model or name its folder (a folder of that name as ./dense)."
        )
