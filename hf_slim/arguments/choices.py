"""The values that a setting may have where it is one of a few."""

from __future__ import annotations

from typing import Literal

ScheduleName = Literal["exp", "cubic", "cos", "linear", "oneshot"]
CriterionName = Literal["magnitude", "snip_momentum", "taylor", "fisher"]
ScopeName = Literal["global", "local"]
LiveChoice = Literal["auto", True, False]
DistillSource = Literal["outputs", "last_hidden"]
