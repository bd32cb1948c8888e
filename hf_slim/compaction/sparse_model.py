"""model_slim: compact a model that is already sparse, whoever zeroed its units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils import logging

from ..arguments import check_whole
from ..proof import check_verify
from .dense_model import mark_unproven
from .proven_removal import find_proof, find_removable, name_unproven, remove_units

logger = logging.get_logger(__name__)


def model_slim(model: nn.Module, round_multiplier: int = 32, verify: bool | Mapping[str, Any] = True) -> nn.Module:
    """Compact a model whose units are already zero, whoever zeroed them, and prove that it computes the same.

    An intermediate channel goes if its FFN2 column is all zero, a head if its output-projection columns are. Needs no
    masks and no data. With rounding, the zero units that remain are kept as they are. If anything is raised, the model
    is as it was before.

    Args:
        model: The sparse model, or a module that holds such; changed in place, the config of every transformers model
            too, so that `save_pretrained` saves the new shape.
        round_multiplier: The number of channels kept in a layer is rounded up to a multiple of this.
        verify: Compare what the model computes before and after, on inputs made from the config of every transformers
            model in it. Where none can be made, as for a module of your own, a warning says so, and it is slimmed all
            the same. A batch (keyword arguments of the forward pass of the one transformers model in it, or of the
            module itself if there is none) is used instead of made inputs. False compares nothing.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument is of a wrong type, the model cannot run on the batch, or it has no weights,
            adapters, or nothing to slim.
        VerificationError: If it computes something else without the units that are zero; the message names the
            structures that make the difference.
    """
    check_whole("round_multiplier", round_multiplier)
    check_verify(verify)
    structures, masks = find_removable(model, round_multiplier)
    if all(mask.all() for mask in masks.values()):
        logger.warning(
            f"model_slim: no unit of the model is zero, or too few for a multiple of {round_multiplier}, so nothing "
            "is removed. Units that left the model while it trained are gone already."
        )
        verify = False
    try:
        proof = find_proof(model, verify)
    except ValueError as error:
        if verify is not True:
            raise
        proof = None
        logger.warning(f"model_slim: it is not proven that the slimmed model computes the same. {error}")
    unproven = remove_units(model, structures, masks, proof)
    mark_unproven(model, structures, unproven)
    if proof is not None and unproven:
        logger.warning(f"model_slim: {name_unproven(unproven)}")
    return model
