"""In what form a slim model would be saved: known before there is one, since shapes alone decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..structures import Structure
from .config_record import has_record
from .cut_tensors import compact_model
from .module_copies import copy_modules
from .stock_config_fields import record_shapes

Form = Literal["stock", "per_layer_config", "record"]
"""Fields of the config, its overrides by layer, or the shape record."""


def cut_copy(
    model: PreTrainedModel, structures: Sequence[Structure], kept: Mapping[str, int]
) -> tuple[PreTrainedModel, list[Structure]]:
    """Copy a model without values, with fewer units, recorded in the copy's config.

    Args:
        model: A model on the meta device.
        structures: Its structures.
        kept: For structures' names how many units the copy has; all where one is not named.

    Returns:
        The copy and its structures.

    Raises:
        ValueError: If its shape cannot be recorded.
    """
    copied: Any = copy_modules(model, {})
    masks = {s.name: torch.arange(s.units, device="cpu") < kept.get(s.name, s.units) for s in structures}
    left = compact_model(copied, structures, masks)
    record_shapes(copied, left)
    return copied, left


def find_form(model: PreTrainedModel) -> Form:
    """In what form the sizes of a model stand in its config.

    Args:
        model: The model.

    Returns:
        `stock` where plain fields say them, as of every dense model.
    """
    if has_record(model.config):
        return "record"
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return "per_layer_config" if any(config.to_dict().get("per_layer_config") for config in configs) else "stock"
