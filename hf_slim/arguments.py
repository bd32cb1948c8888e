"""The fields that say what is removed and when, for `TrainingArguments`, for flags, and alone."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from transformers import Seq2SeqTrainingArguments, TrainingArguments

logger = logging.getLogger(__name__)

ScheduleName = Literal["exp", "cubic", "cos", "linear", "oneshot"]
CriterionName = Literal["magnitude", "snip_momentum", "taylor"]
ScopeName = Literal["global", "local"]
LiveChoice = Literal["auto", True, False]

_SPARSITIES = ("ffn2_sparsity", "mha_sparsity")
_TIMES = ("slim_start", "slim_end", "slim_frequency")
_CHOICES = {
    "slim_schedule": ScheduleName,
    "slim_criterion": CriterionName,
    "slim_scope": ScopeName,
    "slim_live": LiveChoice,
}
_WILDCARD = re.compile(r"[*?]|\[.+\]")
"""What makes a name a shell-style pattern."""


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

    def __post_init__(self) -> None:
        """Check the ranges, then hand over to the other base's checks."""
        check_settings(self)
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


def check_whole(name: str, value: Any) -> None:
    """Refuse what is not a whole number from 1.

    Args:
        name: What the value is called, for the message.
        value: The value.

    Raises:
        ValueError: If it is something else; the message quotes it.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}.")


def place_steps(values: Any, max_steps: int, *, begin: int = 0) -> tuple[int, ...]:
    """Place the pruning steps in a training run.

    The first is at `slim_start`, then one follows every `slim_frequency` steps, and the last is at `slim_end` exactly.
    `oneshot` removes everything at `slim_start`. Fractions are of the steps after `begin`.

    Args:
        values: What has the slimming fields.
        max_steps: Optimizer steps of the whole training.
        begin: Optimizer steps that were done before slimming begins; what should have happened by then happens at
            the next.

    Returns:
        The optimizer steps (counted from 1) after which units are removed, ascending.

    Raises:
        ValueError: If the first step is after the last, or the last beyond the end of training.
    """
    start, end = values.slim_start, values.slim_end
    first, last = (max(begin + 1, _to_step(value, begin, max_steps)) for value in (start, end))
    if first > last:
        raise ValueError(
            f"slim_start={start} is step {first} of {max_steps}, after slim_end={end}, which is step {last}: "
            "make slim_start smaller or slim_end larger."
        )
    if last > max_steps:
        raise ValueError(
            f"slim_end={end} is beyond the last training step, {max_steps}: the target sparsity would never be "
            "reached. Make slim_end smaller, or train longer."
        )
    if values.slim_schedule == "oneshot":
        return (first,)
    return (*range(first, last, max(1, _to_step(values.slim_frequency, 0, max_steps - begin))), last)


def refuse_unused(arguments: Any) -> None:
    """Refuse arguments that ask for a sparsity where nothing would drop units.

    Args:
        arguments: Those of a trainer without a `SlimTrainerCallback`.

    Raises:
        ValueError: If one of the sparsities is above 0.
    """
    asked = [name for name in _SPARSITIES if isinstance(arguments, SlimArgumentsMixin) and getattr(arguments, name)]
    if asked:
        raise ValueError(
            f"{type(arguments).__name__} has {_quote(arguments, asked)}, but the trainer has no SlimTrainerCallback, "
            "so nothing would be removed: pass callbacks=[SlimTrainerCallback()] to the trainer, or leave "
            "ffn2_sparsity and mha_sparsity at 0."
        )


def refuse_two_settings(arguments: Any, config: Any) -> None:
    """Refuse settings that are given twice: to a `SlimTrainerCallback`, and otherwise in the training arguments.

    Args:
        arguments: Those of the trainer. Fields that have their defaults are not given.
        config: What the callback was given: a `SlimConfig`, auto-slim entries, or None.

    Raises:
        ValueError: If a field is given in both and differs, or is given beside entries, which hold all settings.
    """
    if config is None or not isinstance(arguments, SlimArgumentsMixin):
        return
    name = type(arguments).__name__
    given = [f.name for f in fields(SlimConfig) if getattr(arguments, f.name) != f.default]
    if not isinstance(config, SlimConfig):
        if given:
            raise ValueError(
                f"SlimTrainerCallback was given auto-slim entries, which hold all settings, and {name} has "
                f"{_quote(arguments, given)}: give one of the two."
            )
        return
    differing = [field for field in given if getattr(arguments, field) != getattr(config, field)]
    if differing:
        raise ValueError(
            f"Settings are given twice: {name} has {_quote(arguments, differing)}, the SlimConfig of "
            f"SlimTrainerCallback has {_quote(config, differing)}. Give them once, in the arguments (then "
            "SlimTrainerCallback() takes nothing) or in the SlimConfig."
        )


def _quote(values: Any, names: Iterable[str]) -> str:
    return ", ".join(f"{name}={getattr(values, name)!r}" for name in names)


def check_settings(values: Any, called: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse values of the slimming fields that are out of range; whole numbers and lists of patterns are made such.

    Args:
        values: What has the slimming fields; changed in place.
        called: What messages call a field, where that is not its name.

    Raises:
        ValueError: If a value is out of range; the message quotes it.
    """
    names = {f.name: called.get(f.name, f.name) for f in fields(SlimArgumentsMixin)}
    for key in _SPARSITIES:
        value = _check_number(values, key, names)
        if not 0 <= value < 1:
            raise ValueError(f"{names[key]} must be in [0, 1), got {value}: it is the fraction to remove.")
        setattr(values, key, float(value))  # a hyperparameter search keeps the type
    _check_times(values, names)
    for key, kind in _CHOICES.items():
        value = getattr(values, key)
        if not any(value is choice or (value == choice and isinstance(value, str)) for choice in get_args(kind)):
            choices = ", ".join(map(str, get_args(kind)))
            raise ValueError(f"{names[key]} must be one of {choices}, got {value!r}.")
    for key in ("slim_round_to", "slim_min_heads"):
        check_whole(names[key], getattr(values, key))
    if isinstance(values.slim_exclude, str):
        values.slim_exclude = [values.slim_exclude]
    if values.slim_exclude is not None:
        values.slim_exclude = _check_patterns(values.slim_exclude)


def _check_times(values: Any, names: Mapping[str, str]) -> None:
    start, end, frequency = (names[key] for key in _TIMES)
    for key in _TIMES:
        value = _check_number(values, key, names)
        if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            raise ValueError(
                f"{names[key]} must be a step (a whole number from 1) or a fraction of training (in [0, 1)), "
                f"got {value}."
            )
        if key == "slim_end" and value == 1 and isinstance(value, float):
            raise ValueError(
                f"{end}=1.0 is ambiguous: write the step 1 as a whole number. To prune until late, leave "
                f"some of it for recovery, as with {end}=0.9."
            )
        if value >= 1:
            setattr(values, key, int(value))
    if values.slim_frequency == 0:
        raise ValueError(f"{frequency} must be above 0, got 0: it is the distance between two pruning steps.")
    if (values.slim_start < 1) == (values.slim_end < 1) and values.slim_start > values.slim_end:
        raise ValueError(f"{start} must not be after {end}, got {start}={values.slim_start}, {end}={values.slim_end}.")


def _check_number(values: Any, key: str, names: Mapping[str, str]) -> float:
    value = getattr(values, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{names[key]} must be a number, got {value!r}: give a Python int or float.")
    return value


def _check_patterns(patterns: Any) -> list[str]:
    if not isinstance(patterns, (list, tuple)):
        raise ValueError(f"slim_exclude must be a list of patterns, got {patterns!r}.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"slim_exclude must hold patterns, that is strings that are not empty, got {pattern!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            if not _WILDCARD.search(pattern):
                raise ValueError(
                    f"slim_exclude: {pattern!r} is neither a shell-style pattern nor a regular expression: {error}."
                ) from error
    return list(patterns)


def _check_steps(values: Any) -> None:
    """Place the pruning steps now, where the arguments already say how long the training is."""
    steps = getattr(values, "max_steps", 0)
    if steps > 0 and (values.ffn2_sparsity or values.mha_sparsity):
        place_steps(values, steps)


def _to_step(value: float, begin: int, max_steps: int) -> int:
    return int(value) if value >= 1 else begin + round(value * (max_steps - begin))
