"""What structures cost in floating-point operations of a forward pass: counted, without values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..compaction import find_pretrained
from ..proof import RUN_ERRORS, evaluating, make_inputs
from ..structures import Structure, get_tensor
from .costs import Costs, Curve
from .skeleton import Kept, Skeleton

LENGTH = 128
"""Tokens of the text whose forward pass is counted and timed."""

Batches = Sequence[Mapping[str, torch.Tensor]]
"""For each transformers model in a module the keyword arguments of its forward pass."""


def make_batches(model: nn.Module, asked: str) -> Batches:
    """Make what the forward passes are counted and timed on: one example for each transformers model in a module.

    Args:
        model: The model; it is run.
        asked: The setting that needs it, for the message.

    Returns:
        The inputs: a text of 128 tokens, an image, and so on.

    Raises:
        ValueError: If none can be made.
    """
    parts: list[PreTrainedModel] = find_pretrained(model)
    if not parts:
        raise ValueError(
            f"{asked} cannot be used with a {type(model).__name__}, which is no transformers model, so that no inputs "
            "can be made for it: use slim_target_params."
        )
    return [make_inputs(part, LENGTH) for part in parts]


def count_flop_costs(
    skeleton: Skeleton, structures: Sequence[Structure], batches: Batches, dense: Mapping[str, int]
) -> Costs:
    """Count the floating-point operations that belong to the units of structures.

    Two for each multiplication with its addition, as `FlopCounterMode` of PyTorch counts them, in the dense model and
    in one that has lost a unit, for one structure of each group of equal ones: all their operations are matrix
    products, which have a unit's rows, columns or heads as often as there are units.

    Args:
        skeleton: The dense model.
        structures: Those of its structures that are to lose units.
        batches: What the forward pass is counted on.
        dense: What `count_flops` gives for the dense model.

    Returns:
        The costs.
    """
    groups = group_structures(skeleton, structures, dense)
    firsts = [group[0] for group in groups if group[0].units > group[0].multiple]
    lost = _count_lost(skeleton, firsts, batches, dense)
    curves: dict[str, Curve] = {}
    for first, *others in groups:
        operations = lost.get(first.name, dense[""]) * first.units / first.multiple
        curves |= dict.fromkeys((s.name for s in (first, *others)), Curve((0, first.units), (0.0, operations)))
    return Costs("FLOPs", dense[""], curves)


def _count_lost(
    skeleton: Skeleton, structures: Sequence[Structure], batches: Batches, dense: Mapping[str, int]
) -> dict[str, int]:
    """The operations that structures lose with their last unit: in one pass, if each module belongs to one of them."""
    smaller = {s.name: s.units - s.multiple for s in structures}
    lost = dict.fromkeys(smaller, 0)
    left = find_own(count_flops(skeleton, batches, smaller)) if smaller else {}
    for path, operations in find_own(dense).items() if smaller else ():
        if operations != left.get(path, 0):
            owners = [s.name for s in structures if any(f"{m.tensor}.".startswith(f"{path}.") for m in s.members)]
            if len(owners) != 1:
                return {n: dense[""] - count_flops(skeleton, batches, {n: smaller[n]})[""] for n in smaller}
            lost[owners[0]] += operations - left.get(path, 0)
    return lost


def find_own(flops: Mapping[str, int]) -> dict[str, int]:
    """Find the operations of modules without those of what is in them.

    Args:
        flops: What `count_flops` gives.

    Returns:
        For each module's dotted name its own operations; by no name those of the model itself.
    """
    own = dict(flops)
    for path, operations in flops.items():
        around = path
        while around:
            around = around.rpartition(".")[0]
            if around in flops:
                own[around] -= operations
                break
    return own


def count_flops(skeleton: Skeleton, batches: Batches, kept: Kept) -> dict[str, int]:
    """Count the operations of one forward pass.

    Args:
        skeleton: The dense model.
        batches: The inputs.
        kept: How many units the structures have.

    Returns:
        For each module's dotted name its number of operations; that of all modules by no name.

    Raises:
        ValueError: If the model has no values, and its code looks at them.
    """
    try:
        return _count(skeleton.build_countable(kept, has_values=False), batches, "meta")
    except RUN_ERRORS as error:  # the code looks at values, which the meta device has not
        if skeleton.device.type == "meta":
            raise ValueError(f"{type(skeleton.model).__name__} runs only with weights: {error}") from error
        return _count(skeleton.build_countable(kept, has_values=True), batches, skeleton.device)


def _count(model: nn.Module, batches: Batches, device: torch.device | str) -> dict[str, int]:
    counts = {"": 0}
    names = {module: name for name, module in model.named_modules()}
    for part, batch in zip(find_pretrained(model), batches, strict=True):
        with evaluating(part), FlopCounterMode(display=False) as counter:
            part(**{name: tensor.to(device) for name, tensor in batch.items()})
        counts[""] += counter.get_total_flops()
        for path, operations in counter.get_flop_counts().items():
            inside = path.partition(".")[2]
            if inside:
                counts[".".join(filter(None, (names[part], inside)))] = sum(operations.values())
    return counts


def group_structures(
    skeleton: Skeleton, structures: Sequence[Structure], flops: Mapping[str, int]
) -> list[tuple[Structure, ...]]:
    """Group structures that cost the same: equal tensors, at places that differ in numbers, run on as many positions.

    Args:
        skeleton: The dense model.
        structures: Some of its structures.
        flops: What `count_flops` gives for it.

    Returns:
        The groups, in the order of their first structures.
    """
    groups: dict[object, list[Structure]] = {}
    for structure in structures:
        members = tuple(
            (m.role, m.dim, tuple(m.index.shape), tuple(get_tensor(skeleton.model, m.tensor).shape))
            for m in structure.members
        )
        reader = structure.outputs[0].tensor.rpartition(".")[0]
        key = re.sub(r"\d+", "*", structure.name), structure.units, members, flops.get(reader)
        groups.setdefault(key, []).append(structure)
    return [tuple(group) for group in groups.values()]
