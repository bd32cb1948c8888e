"""The proof, by numbers, that a model computes without its zero units what it computed with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.utils import logging

from ..parallel import check_values
from ..proof import (
    HALF,
    VerificationError,
    compare_outputs,
    is_comparable,
    make_inputs,
)
from ..structures import (
    REMEDY,
    Masks,
    Structure,
    find_structures,
    has_adapters,
    merge_adapters,
    require_structures,
)
from .config_record import find_pretrained
from .cut_tensors import round_masks
from .numerical_proof import Proof
from .stock_config_fields import record_shapes
from .undo import Undo
from .zeros import find_zero_units

logger = logging.get_logger(__name__)


def find_proof(
    model: nn.Module, verify: bool | Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> Proof | None:
    """Run a masked model on a batch, or on inputs that are made for it.

    Args:
        model: The masked model.
        verify: A batch for the transformers model in it, or for itself where it holds none; True if a batch is to be
            found; False if nothing is to be proven.
        own: A batch of the training of the model, which is used if the model runs on it.

    Returns:
        The proof; None if nothing is to be proven.

    Raises:
        ValueError: If the model cannot run on the batch, or no input can be made for it.
    """
    if verify is False:
        return None
    parts = find_pretrained(model)
    if isinstance(verify, Mapping):
        if len(parts) > 1:
            names = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(f"verify: one batch cannot be for {len(parts)} models ({names}); pass True or False.")
        return Proof(model, {parts[0] if parts else model: dict(verify)})
    if not parts:
        raise ValueError(
            f"{type(model).__name__} is no transformers model, so that no inputs can be made for it: pass a batch of "
            "yours, verify={...}, or verify=False."
        )
    if own is not None and len(parts) == 1:
        try:
            proof = Proof(model, {parts[0]: own})
        except ValueError as error:
            logger.info(f"Compared on made inputs, not on a batch of the trainer's data: {error}")
        else:
            if all(is_comparable(output) for output in proof.outputs.values()):
                return proof
            logger.info("Compared on made inputs: on a batch of the trainer's data the outputs are not all finite.")
    return Proof(model, {part: make_inputs(part) for part in parts})


def merge_proven(model: nn.Module, proof: Proof | None) -> tuple[nn.Module, Proof | None]:
    """Merge the adapters of a model, and see that it computes the same afterwards.

    In half precision merging rounds the weights, so that there is nothing to compare with.

    Args:
        model: A model with adapters or without.
        proof: What it computes; None if nothing is to be proven.

    Returns:
        The model without adapters, and what that computes.

    Raises:
        VerificationError: If it computes something else.
    """
    if not has_adapters(model):
        return model, proof
    merged = merge_adapters(model)
    if proof is None:
        return merged, None
    before, proof = proof, Proof(merged, proof.batches)
    if not any(parameter.dtype in HALF for parameter in merged.parameters()):
        try:
            compare_outputs(before.outputs, proof.outputs)
        except VerificationError as error:
            raise VerificationError(f"With the adapters merged: {error} Nothing was saved.") from error
    return merged, proof


def find_removable(model: nn.Module, multiple: int, known: Masks | None = None) -> tuple[tuple[Structure, ...], Masks]:
    """Find the zero units of a model that can be removed.

    Args:
        model: The masked model.
        multiple: Multiple for the number of intermediate channels.
        known: For the names of structures with units that are known to be zero a boolean tensor of shape `[units]`,
            True = keep. What else is zero is looked for.

    Returns:
        Its structures; and for the name of each a boolean tensor of shape `[units]`, True = keep.

    Raises:
        ValueError: If the model has adapters, no weights, or nothing to slim.
    """
    found = find_structures(model)
    if has_adapters(model):
        raise ValueError(f"{type(model).__name__} has adapters, so it cannot be made smaller. {REMEDY}")
    structures = require_structures(model, found)
    check_values(model, (member.tensor for s in structures for member in s.members))
    known = {} if known is None else known
    masks = {s.name: known[s.name] for s in structures if len(known.get(s.name, ())) == s.units}
    for name, used in find_zero_units(model, structures).items():
        masks[name] = masks.get(name, used) & used
    return structures, round_masks(structures, masks, multiple)


def remove_units(
    model: nn.Module, structures: Sequence[Structure], masks: Masks, proof: Proof | None, *, is_copy: bool = False
) -> tuple[str, ...]:
    """Remove zero units from a model and prove that it computes the same; or leave it as it was.

    Args:
        model: The masked model; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; what they drop is zero.
        proof: What it computes; None if nothing is to be proven.
        is_copy: Whether another model holds the same tensors, and this one is to be saved.

    Returns:
        The names of the structures that have lost units without proof, since no input reached them, or there was none.

    Raises:
        VerificationError: If the model computes something else.
        BaseException: What is raised meanwhile; the model is then as before.
    """

    def record(left: Sequence[Structure]) -> None:
        record_shapes(model, left)

    dropped = [s for s in structures if not masks[s.name].all()]
    if proof is not None and dropped:
        proof.remove(structures, masks, record, shared=is_copy)
        return proof.find_unproven(structures, masks)
    undo = Undo(model, shared=is_copy)
    try:
        record(undo.cut(structures, masks))
    except BaseException:
        undo.put_back()
        raise
    return tuple(s.name for s in dropped)


def name_unproven(names: Sequence[str]) -> str:
    """What is said of structures that no input reached."""
    return (
        f"No input reached {', '.join(names)}, so it is not proven that the slimmed model computes the same there. "
        "Pass a batch that does, verify={...}."
    )
