"""Whether the values of the fields about a teacher are in range."""

from __future__ import annotations

import math
from typing import Any

from .range_checks import check_number

TEACHER_FIELDS = (
    *("slim_teacher", "slim_distill_weight", "slim_temperature", "slim_hidden_weight"),
    *("slim_distill_from", "slim_teacher_dtype", "slim_cache_teacher"),
)
_DTYPES = ("float32", "bfloat16", "float16")


def check_teacher_fields(values: Any) -> None:
    """Refuse values of the fields about a teacher that are out of range.

    Args:
        values: What has the slimming fields; whole numbers are made such with a decimal point, in place.

    Raises:
        ValueError: If a value is out of range; the message names the field and quotes the value.
    """
    for key in ("slim_distill_weight", "slim_temperature", "slim_hidden_weight"):
        setattr(values, key, float(check_number(values, key)))
    if not 0 <= values.slim_distill_weight <= 1:
        raise ValueError(
            f"slim_distill_weight must be in [0, 1], got {values.slim_distill_weight}: 0 is the task's loss alone, 1 "
            "the teacher alone."
        )
    if not 0 < values.slim_temperature < math.inf:
        raise ValueError(f"slim_temperature must be above 0, got {values.slim_temperature}.")
    if not 0 <= values.slim_hidden_weight < math.inf:
        raise ValueError(f"slim_hidden_weight must not be below 0, got {values.slim_hidden_weight}.")
    if values.slim_distill_from == "last_hidden" and not values.slim_hidden_weight:
        raise ValueError(
            "slim_distill_from='last_hidden' compares the last hidden state alone, and slim_hidden_weight=0.0 gives it"
            " no weight: set slim_hidden_weight, for example to 1."
        )
    if not isinstance(values.slim_teacher, (str, type(None))) or values.slim_teacher == "":
        raise ValueError(
            f"slim_teacher must be 'self', a folder or a Hub name, got {values.slim_teacher!r}: pass a model as "
            "SlimTrainer(..., teacher_model=model)."
        )
    if values.slim_teacher_dtype is not None and values.slim_teacher_dtype not in _DTYPES:
        raise ValueError(
            f"slim_teacher_dtype must be one of {', '.join(_DTYPES)}, got {values.slim_teacher_dtype!r}: a teacher in "
            "another type is loaded in it and passed as teacher_model."
        )
    if not isinstance(values.slim_cache_teacher, bool):
        raise ValueError(f"slim_cache_teacher must be True or False, got {values.slim_cache_teacher!r}.")
