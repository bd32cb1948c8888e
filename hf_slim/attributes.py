"""Reading and writing the attributes of modules that depend on the number of units."""

from __future__ import annotations

from typing import Any

from torch import nn

from .structures import Count, get_module

_CONFIG = "config."


class ConfigView:
    """A config as one module sees it: some fields of its own, all others those of the model's config."""

    def __init__(self, config: Any, **fields: Any) -> None:
        """Look at a config.

        Args:
            config: The model's config.
            **fields: The fields that differ.
        """
        self.__dict__.update(fields, _config=config)

    def __getattr__(self, name: str) -> Any:
        """Any field that is not its own, read from the model's config."""
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


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


def get_count(model: nn.Module, count: Count) -> Any:
    """The value of an attribute that depends on the number of units.

    Args:
        model: The model.
        count: Which attribute of which module.

    Returns:
        Its value, None if it is only set when units are removed.
    """
    owner: Any = get_module(model, count.module)
    for name in count.attribute.split("."):
        owner = getattr(owner, name, None)
    return owner


def set_count(model: nn.Module, count: Count, units: int) -> None:
    """Give such an attribute the value for a number of units.

    A module that reads the attribute from its config gets a view of the config with that field changed.

    Args:
        model: The model; changed in place.
        count: Which attribute of which module.
        units: The number of units.
    """
    module = get_module(model, count.module)
    if not count.attribute.startswith(_CONFIG):
        setattr(module, count.attribute, count.value(units))
        return
    field = count.attribute.removeprefix(_CONFIG)
    if isinstance(module.config, ConfigView):
        module.config.__dict__[field] = count.value(units)
    else:
        module.config = ConfigView(module.config, **{field: count.value(units)})  # type: ignore[assignment]
