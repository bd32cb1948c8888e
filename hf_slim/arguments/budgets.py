"""How much is asked for: sparsities, or one budget of parameters, operations or time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .choices import CriterionName

SPARSITIES = ("ffn2_sparsity", "mha_sparsity")
BUDGETS = {
    "slim_target_params": "parameters",
    "slim_target_flops": "FLOPs",
    "slim_target_latency": "ms",
}
"""The fields of budgets, and what they are counted in."""
BUDGET_CRITERION: CriterionName = "fisher"
_CRITERIA = ("taylor", BUDGET_CRITERION)
"""What `slim_criterion` may be beside a budget: its default, in place of which the additive one is taken, and that."""


class Budget(NamedTuple):
    """What a slim model may have of something.

    Args:
        field: The setting that asks for it.
        unit: `parameters`, `FLOPs` or `ms`.
        value: A number of these, or a fraction of what the dense model has.
        is_fraction: Whether it is a fraction.
    """

    field: str
    unit: str
    value: float
    is_fraction: bool

    def amount(self, dense: float) -> float:
        """How many of the unit that is, where the dense model has so many."""
        return self.value * dense if self.is_fraction else self.value


def find_asked(values: Any) -> list[str]:
    """The settings that ask for units to be removed.

    Args:
        values: What has the slimming fields.

    Returns:
        The names of the sparsities above 0 and of the budgets that are given.
    """
    return [name for name in (*SPARSITIES, *BUDGETS) if getattr(values, name) not in (None, 0)]


def read_budget(values: Any) -> Budget | None:
    """The budget that is asked for.

    Args:
        values: What has the slimming fields, which passed `check_budgets`.

    Returns:
        The budget, None if there is none.
    """
    for field, unit in BUDGETS.items():
        value = getattr(values, field)
        if isinstance(value, str):
            return Budget(field, unit, float(value.removesuffix("ms")), is_fraction=False)
        if value is not None:
            return Budget(field, unit, value, is_fraction=value < 1)
    return None


def check_budgets(values: Any) -> None:
    """Refuse budgets that are no such, that are two, or that are beside what they stand in place of.

    Args:
        values: What has the slimming fields; changed in place: fractions become numbers below 1, counts whole numbers,
            times strings such as `4ms`.

    Raises:
        ValueError: If a value is out of range, or another one is asked for at the same time.
    """
    for field, unit in BUDGETS.items():
        setattr(values, field, _parse(field, unit, getattr(values, field)))
    asked = find_asked(values)
    budgets = [name for name in asked if name in BUDGETS]
    if budgets and len(asked) > 1:
        raise ValueError(
            f"{' and '.join(asked)} are given, and each says by itself how much is removed: give the sparsities, or "
            "one budget."
        )
    if budgets and values.slim_scope != "global":
        raise ValueError(
            f"slim_scope={values.slim_scope!r} cannot be used with {budgets[0]}, which ranks the units of all layers "
            "together: leave it out."
        )
    if budgets and values.slim_criterion not in _CRITERIA:
        raise ValueError(
            f"slim_criterion={values.slim_criterion!r} cannot be used with {budgets[0]}, which weighs channels "
            f"against heads by scores that add up: leave it out, and {BUDGET_CRITERION!r} is used."
        )


def _parse(field: str, unit: str, value: Any) -> float | int | str | None:
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else ""
    is_percent, is_time = text.endswith("%"), unit == "ms" and text.endswith("ms")
    suffix = "%" if is_percent else "ms" if is_time else ""
    try:
        number = math.nan if isinstance(value, bool) else float(text.removesuffix(suffix) or value)
    except (TypeError, ValueError):
        number = math.nan
    if is_percent:
        number = number / 100
    is_count = is_time or (number > 1 and not is_percent)
    if 0 < number < (math.inf if is_count else 1):
        if not is_count:
            return number
        if unit == "ms":
            return f"{number:.12g}ms"
        if number == int(number):
            return int(number)
    count = "milliseconds ('4ms')" if unit == "ms" else f"a whole number of {unit} above 1"
    raise ValueError(
        f"{field} must be a fraction of what the dense model has, above 0 and below 1 (0.5 or '50%'), or {count}, "
        f"got {value!r}."
    )
