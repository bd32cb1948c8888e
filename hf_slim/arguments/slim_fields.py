"""The fields that say what is removed and when, for `TrainingArguments`, for flags, and alone."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .budgets import find_asked
from .choices import CriterionName, DistillSource, LiveChoice, ScheduleName, ScopeName
from .pruning_steps import place_steps
from .range_checks import check_settings
from .teacher_checks import check_teacher_fields


@dataclass
class SlimArgumentsMixin:
    """The slimming fields, to be combined with any `TrainingArguments` class.

    Put it first among the bases: `class MyArguments(SlimArgumentsMixin, MyTrainingArguments)`.

    Raises:
        ValueError: If a value is out of range; the message names the field and quotes the value.
    """

    ffn2_sparsity: float = field(
        default=0.0,
        metadata={"help": "Fraction of the intermediate channels to remove, in [0, 1)."},
    )
    mha_sparsity: float = field(
        default=0.0,
        metadata={"help": "Fraction of the attention heads (or key-value groups) to remove, in [0, 1)."},
    )
    slim_start: float = field(
        default=0.05,
        metadata={"help": "First pruning step: 1 or more is a step, below 1 a fraction of training."},
    )
    slim_end: float = field(
        default=0.3,
        metadata={
            "help": "Last pruning step, at which the target sparsity is reached; recovery follows. "
            "1 or more is a step, below 1 a fraction of training."
        },
    )
    slim_frequency: float = field(
        default=0.02,
        metadata={"help": "Distance of the pruning steps: 1 or more is in steps, below 1 a fraction of training."},
    )
    slim_schedule: ScheduleName = field(
        default="cubic",
        metadata={"help": "How the sparsity grows from the first to the last pruning step."},
    )
    slim_criterion: CriterionName = field(
        default="taylor",
        metadata={"help": "Importance score of a unit."},
    )
    slim_scope: ScopeName = field(
        default="global",
        metadata={"help": "Rank units over all layers (global) or remove the same fraction of every layer (local)."},
    )
    slim_round_to: int = field(
        default=32,
        metadata={"help": "Round the intermediate channels kept in a layer up to a multiple of this."},
    )
    slim_min_heads: int = field(
        default=1,
        metadata={"help": "Attention heads (or key-value groups) that every layer keeps at least."},
    )
    slim_exclude: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of modules to leave alone. Each is a shell-style pattern or a regular expression that "
            "matches a module's whole dotted name or the end of it."
        },
    )

    slim_live: LiveChoice = field(
        default="auto",
        metadata={
            "help": "Remove dropped units from the model at once, so that training speeds up (True), keep them as "
            "zeros until it is saved (False), or remove them at once wherever shapes can change under way (auto)."
        },
    )

    slim_target_params: float | str | None = field(
        default=None,
        metadata={
            "help": "Parameters that the slim model may have, in place of the sparsities: a fraction of the dense "
            "model's, such as 0.5, or a number."
        },
    )
    slim_target_flops: float | str | None = field(
        default=None,
        metadata={
            "help": "Floating-point operations of a forward pass that the slim model may take, in place of the "
            "sparsities: a fraction of the dense model's, such as 0.5, or a number."
        },
    )
    slim_target_latency: float | str | None = field(
        default=None,
        metadata={
            "help": "Time that a forward pass of the slim model may take, in place of the sparsities: a fraction of "
            "the dense model's, such as 0.5, or milliseconds, such as 4ms."
        },
    )
    slim_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Model to learn from: 'self' (the model as it is when training begins), a folder or a Hub name; "
            "in `hf-slim run` also 'dense'. It needs a SlimTrainer."
        },
    )
    slim_distill_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of what the teacher says against the loss of the task, in [0, 1]."},
    )
    slim_temperature: float = field(
        default=2.0,
        metadata={"help": "Temperature at which the logits of teacher and model are compared, above 0."},
    )
    slim_hidden_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the hidden states, layer by layer, within what the teacher says."},
    )
    slim_distill_from: DistillSource = field(
        default="outputs",
        metadata={
            "help": "What the teacher is compared in: its outputs (logits or embeddings), or its last hidden state "
            "alone (last_hidden)."
        },
    )
    slim_teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "Type of the teacher's weights, such as bfloat16; its own if it is not given."},
    )
    slim_cache_teacher: bool = field(
        default=False,
        metadata={"help": "Keep the teacher's outputs of the first epoch, for data that are the same in every one."},
    )

    def __post_init__(self) -> None:
        """Check the ranges, then hand over to the other base's checks."""
        check_settings(self)
        check_teacher_fields(self)
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        _check_steps(self)


@dataclass
class SlimConfig(SlimArgumentsMixin):
    """The slimming fields alone, for `SlimTrainerCallback(SlimConfig(...))` beside plain `TrainingArguments`."""

    @classmethod
    def from_arguments(cls, arguments: Any) -> SlimConfig:
        """Read the slimming fields of any object that has them.

        Args:
            arguments: For example a `SlimTrainingArguments`.

        Returns:
            A `SlimConfig` with the same values.

        Raises:
            ValueError: If the object lacks the fields, or a value is out of range.
        """
        missing = [f.name for f in fields(cls) if not hasattr(arguments, f.name)]
        if missing:
            raise ValueError(
                f"{type(arguments).__name__} has no field {missing[0]!r}: train with SlimTrainingArguments (or your "
                "arguments class combined with SlimArgumentsMixin), or pass a SlimConfig to SlimTrainerCallback."
            )
        return cls(**{f.name: getattr(arguments, f.name) for f in fields(cls)})


@dataclass
class SlimTrainingArguments(SlimArgumentsMixin, TrainingArguments):
    """`TrainingArguments` with the slimming fields."""


@dataclass
class SlimSeq2SeqTrainingArguments(SlimArgumentsMixin, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the slimming fields."""


def _check_steps(values: Any) -> None:
    """Place the pruning steps now, where the arguments already say how long the training is."""
    steps = getattr(values, "max_steps", 0)
    if steps > 0 and find_asked(values):
        place_steps(values, steps)
