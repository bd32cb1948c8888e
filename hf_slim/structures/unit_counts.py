"""Reading and writing the attributes of modules that depend on the number of units."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modeling_hf_slim import ConfigView, set_number
from .structure import Count, get_module


def get_field(config: Any, name: str) -> Any:
    """A field of a config under any of its names.

    Args:
        config: A config, a view of one, or None.
        name: Name of the field.

    Returns:
        Its value, None if the config has no such field.
    """
    if isinstance(config, ConfigView) and name not in config.__dict__:
        config = config.__dict__["_config"]
    name = getattr(type(config), "attribute_map", {}).get(name, name)
    return getattr(config, "__dict__", {}).get(name)


def set_count(model: nn.Module, count: Count, units: int) -> None:
    """Give such an attribute the value for a number of units.

    A module that reads the attribute from its config gets a view of the config with that field changed.

    Args:
        model: The model; changed in place.
        count: Which attribute of which module.
        units: The number of units.
    """
    set_number(get_module(model, count.module), count.attribute, count.value(units))
