"""slim: make a model smaller in one shot, without training, from a few hundred samples."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, get_args

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils import logging

from ..arguments import SlimConfig, find_teacher_fields
from ..compaction import find_pretrained, find_proof, mark_unproven, remove_units, zero_units
from ..parallel import check_values, is_dispatched, is_spread, refuse_strategy
from ..proof import keeping_random_state
from ..saving import SlimReport, StructureSize, count_bytes, count_parameters, find_settings, keep_slimming
from ..structures import (
    REMEDY,
    Discovery,
    Structure,
    count_left,
    find_structures,
    get_tensor,
    has_adapters,
    require_structures,
)
from ..training import Plan, make_plan, refuse_attached
from .calibration_batches import Calibration, has_decoder, make_batches
from .kept_weights import KeptWeights
from .methods import METHODS, Masks, MethodName

logger = logging.get_logger(__name__)


@keeping_random_state()
@torch.inference_mode(False)  # the weights that it makes are to be trained
def slim(
    model: nn.Module,
    dataset: Any,
    config: SlimConfig,
    *,
    num_calibration_samples: int = 512,
    max_seq_length: int | None = None,
    batch_size: int = 8,
    data_collator: Any = None,
    method: MethodName = "obs",
) -> SlimReport:
    """Remove units of a model in one shot, without training, by what its layers read of a few hundred samples.

    By the default method, optimal brain surgery, the layers are slimmed one after the other, from the first to the
    last: what the layer behind the units reads (FFN2, output projection) says which units cost least, and the weights
    that stay are changed so that its output is, in the least-squares sense, as near as can be to what it was. The
    next layer is slimmed on what the model slimmed so far gives. No gradients are needed. What the model was is kept
    in temporary files meanwhile, and so is, on the CPU, what the forward passes hold while they wait. If anything is
    raised, the model is as it was, bit for bit, but for an interrupt in the moment in which those files are deleted,
    when all is done. The slim model computes what the model with zeros in place of its units does, which is compared
    on a sample.

    Save the result by `save_slimmed`, whose card then says all this, or by `save_pretrained`, or train it first.

    Args:
        model: The model; changed in place, its config, too.
        dataset: Calibration data as the model takes them: a data set or an iterable of dicts, or a `DataLoader`. The
            first samples are taken. Columns that the forward pass does not take are left out, and so are labels, but
            for `method="taylor"` and for models with an encoder and a decoder. Padding, by the attention mask, does
            not count.
        config: How much to remove, of what; the fields about schedule, criterion and live compaction say nothing here.
            With `slim_scope="global"` a first pass ranks the units of all layers together; `local` spares it.
        num_calibration_samples: How many samples to take.
        max_seq_length: Longer token sequences are cut; None if they are not to be.
        batch_size: Samples of a forward pass.
        data_collator: Makes a batch of samples; None for the default one of transformers, which does not pad.
        method: `obs`; `flap`, which goes by how inputs vary and changes biases only; `taylor`, the first-order term of
            the loss, which needs labels and gradients; `magnitude`, which goes by weights only. The last three leave
            the weights that stay as they are.

    Returns:
        Parameters, bytes and the size of every structure before and after; prints as a table.

    Raises:
        ValueError: If an argument or the data do not fit, the model cannot be slimmed so far or at all, or its
            activations are not finite; the message says where.
        VerificationError: If the model computes something else without its zero units.
        OSError: If there is no room for temporary files.
    """
    if method not in get_args(MethodName):
        raise ValueError(f"method must be one of {', '.join(get_args(MethodName))}, got {method!r}.")
    model = _check_model(model)
    found = find_structures(model)
    plan = _make_plan(model, config, found)
    data = make_batches(
        model,
        dataset,
        num_samples=num_calibration_samples,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        data_collator=data_collator,
        with_labels=method == "taylor" or has_decoder(model),
    )
    structures = require_structures(model, found)
    before = count_parameters(model), count_bytes(model)
    with KeptWeights(model) as kept:
        masks = METHODS[method](model, plan, data, kept)
        unproven = _remove(model, structures, masks, data)
        kept_units = {s.name: count_left(model, s) for s in structures}
        sizes = tuple(StructureSize(s.name, s.kind, s.units, kept_units[s.name]) for s in structures)
        budget = plan.report_budget(kept_units)
        report = SlimReport(before[0], count_parameters(model), before[1], count_bytes(model), sizes, unproven, budget)
    keep_slimming(model, {"method": method, **find_settings(asdict(config))}, budget)
    return report


def _check_model(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"slim takes a model (a torch.nn.Module), got {type(model).__name__}.")
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if has_adapters(model):
        raise ValueError(f"slim cannot slim a {type(model).__name__} with adapters. {REMEDY}")
    refuse_strategy(model)
    refuse_attached(model)
    if is_spread(model) or is_dispatched(model):
        raise ValueError("slim needs the whole model on one device: load it without a device_map, or gather it first.")
    return model


def _make_plan(model: nn.Module, config: Any, found: Discovery) -> Plan:
    config = config if isinstance(config, SlimConfig) else SlimConfig.from_arguments(config)
    if asked := find_teacher_fields(config):
        raise ValueError(
            f"{', '.join(asked)}: in one shot there is no training that could learn from a teacher. "
            "Leave it out here, and give it to the training that follows."
        )
    once = replace(config, slim_schedule="oneshot", slim_start=1, slim_end=1, slim_frequency=1)
    plan = make_plan(model, once, 1, found=found)
    if not plan.targets:
        raise ValueError("Nothing is to be removed: give ffn2_sparsity, mha_sparsity or a budget in the SlimConfig.")
    names = list(dict.fromkeys(member.tensor for s in plan.structures for member in s.members))
    check_values(model, names)
    for name in names:
        if not get_tensor(model, name).isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values, so that nothing can be told of its units: its training has "
                "diverged, or its file is damaged. Load another checkpoint, or leave it out with slim_exclude."
            )
    return plan


@torch.no_grad()
def _remove(model: nn.Module, structures: tuple[Structure, ...], masks: Masks, data: Calibration) -> tuple[str, ...]:
    """Remove the units that are zero now, and compare with the model that has zeros, on a sample."""
    whole = {s.name: torch.ones(s.units, dtype=torch.bool) for s in structures} | masks
    zero_units(model, structures, whole)  # buffers, which a forward pass is not to change, are as before
    parts = find_pretrained(model)
    own = not parts or parts[0] is model
    try:
        proof = find_proof(model, data.sample if own else True)
    except ValueError as error:
        inputs = f"the first sample of the data set, with {', '.join(data.sample)}" if own else "inputs made for it"
        raise ValueError(
            f"{type(model).__name__} cannot run on {inputs}, so that what it computes cannot be compared: "
            f"{error.__cause__ or error}"
        ) from error
    unproven = remove_units(model, structures, whole, proof)
    mark_unproven(model, structures, unproven)
    if unproven:
        logger.warning(
            f"slim: the first sample does not reach {', '.join(unproven)}, so it is not proven that the slimmed model "
            "computes the same there. Let the data begin with one that does."
        )
    return unproven
