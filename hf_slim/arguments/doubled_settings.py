"""Settings that nobody would carry out, and settings that are given in two places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from .budgets import find_asked
from .slim_fields import SlimArgumentsMixin, SlimConfig
from .teacher_checks import TEACHER_FIELDS


def refuse_unused(arguments: Any) -> None:
    """Refuse arguments that ask for a sparsity or a budget where nothing would drop units.

    Args:
        arguments: Those of a trainer without a `SlimTrainerCallback`.

    Raises:
        ValueError: If one of the sparsities is above 0, or a budget is given.
    """
    asked = find_asked(arguments) if isinstance(arguments, SlimArgumentsMixin) else []
    if asked:
        raise ValueError(
            f"{type(arguments).__name__} has {_quote(arguments, asked)}, but the trainer has no SlimTrainerCallback, "
            "so nothing would be removed: pass callbacks=[SlimTrainerCallback()] to the trainer, or leave "
            "ffn2_sparsity and mha_sparsity at 0 and the budgets out."
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
        given = [field for field in given if field not in TEACHER_FIELDS]
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


def find_teacher_fields(settings: SlimConfig) -> list[str]:
    """The fields about a teacher that are not at their defaults, as messages quote them.

    Args:
        settings: The settings.

    Returns:
        For example `slim_hidden_weight=1.0`.
    """
    defaults = SlimConfig()
    changed = [name for name in TEACHER_FIELDS if getattr(settings, name) != getattr(defaults, name)]
    return [_quote(settings, [name]) for name in changed]


def _quote(values: Any, names: Iterable[str]) -> str:
    return ", ".join(f"{name}={getattr(values, name)!r}" for name in names)
