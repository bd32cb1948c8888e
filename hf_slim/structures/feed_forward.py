"""From a module that matches a layout of feed-forward networks to its structure."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .layout_rows import FfnLayout
from .linear_layers import Layer, find_child, find_layer, join, tensors_outside
from .projection_names import CHANNEL_COUNTS
from .rms_norms import find_epsilon, fold_norm
from .source_code import find_reads
from .structure import Count, Explained, Member, Structure, UnaccountedError, blocks, spread
from .unit_counts import get_field

_REDUCTIONS = {"mean", "std", "var", "topk"}


def matches_ffn(module: nn.Module, layout: FfnLayout) -> bool:
    """Whether a module has the children of a layout."""
    if any(find_layer(module, name) is None for name in (*layout.first, layout.second)):
        return False
    return not layout.alone or not list(tensors_outside(module, (*layout.first, layout.second)))


def read_ffn(module: nn.Module, layout: FfnLayout) -> Structure:
    """Read the structure of a feed-forward network.

    Args:
        module: The module.
        layout: A layout that it matches.

    Returns:
        The structure, its names relative to the module; its units are the intermediate channels.

    Raises:
        UnaccountedError: If something in the module is not explained by the layout.
    """
    first, second = _read_layers(module, layout)
    width = second.inputs
    copies = max(layer.groups for layer in (*first, second))
    if any(layer.groups not in (1, copies) for layer in (*first, second)) or width % copies:
        raise UnaccountedError(f"its layers have {copies} groups and others, which do not fit together")
    units = width // copies
    members = [m for layer in first for m in layer.members(_channels(module, layer, width, copies), "input")]
    children = {name: find_child(module, name) for name in layout.between}
    between = [_read_between(name, child, units) for name, child in children.items() if child is not None]
    members += [member for part in between for member in part.members]
    members += second.members(blocks(units, 1) if second.groups > 1 else spread(units, width, copies), "output")
    _refuse_others(module, layout, {width, first[0].outputs}, width, second.outputs)
    counts = [count for part in between for count in part.counts]
    counts += _read_attributes(module, width, units, second.outputs)
    # The grouped matrix product of stacked experts asks for rows of a multiple of 16 bytes.
    multiple = 16 // module.get_parameter(second.weight).element_size() if second.bias_dim == 1 else 1
    return Structure(layout.second, "ffn", units, tuple(members), tuple(counts), multiple=multiple)


def _read_layers(module: nn.Module, layout: FfnLayout) -> tuple[list[Layer], Layer]:
    """The layers, in the orientation in which their sizes fit together."""
    stated = module.__dict__.get("is_transposed")
    for swapped in (False, True) if stated is None else (stated,):
        found = [find_layer(module, name, swapped=swapped) for name in (*layout.first, layout.second)]
        *first, second = [layer for layer in found if layer is not None]
        widths = {layer.outputs for layer in first}
        allowed = ({second.inputs}, {2 * second.inputs}) if len(first) == 1 else ({second.inputs},)
        stacked = first[0].bias_dim == 1
        if stacked != (second.bias_dim == 1) or (stacked and first[0].inputs != second.outputs):
            continue
        if widths in allowed:
            return first, second
    raise UnaccountedError(
        f"{' and '.join(layout.first)} make {' and '.join(str(layer.outputs) for layer in first)} channels, but "
        f"{layout.second} reads {second.inputs}"
    )


def _channels(module: nn.Module, layer: Layer, width: int, copies: int) -> torch.LongTensor:
    """The positions of the channels in a first layer, which may hold gate and up."""
    units = width // copies
    if layer.outputs == width:
        return spread(units, width, copies)
    if module.__dict__.get("is_concatenated", True):
        gate, up = spread(units, width, copies), spread(units, width, copies, start=width)
        return torch.cat([gate, up], dim=1)  # type: ignore[return-value]
    return blocks(units, 2)


def _read_between(name: str, child: nn.Module, units: int) -> Explained:
    """A depthwise convolution of the channels, or an RMS norm over them."""
    inner = next((key for key, module in child.named_modules() if isinstance(module, _ConvNd)), None)
    if inner is not None:
        conv = child.get_submodule(inner)
        assert isinstance(conv, _ConvNd)
        if conv.groups != units or conv.weight.shape[:2] != (units, 1) or len([*child.parameters()]) > 2:
            raise UnaccountedError(f"{name} is not a depthwise convolution of the {units} intermediate channels")
        leaves = (join(name, inner, leaf) for leaf, _ in conv.named_parameters())
        return Explained((name,), [Member(leaf, 0, blocks(units, 1), "extra") for leaf in leaves])
    epsilon = find_epsilon(child)
    if epsilon is None or child.get_parameter("weight").shape != (units,):
        raise UnaccountedError(
            f"{name} normalizes the {units} intermediate channels together, not as an RMS norm does"
        )
    member, count = fold_norm(name, child, epsilon, units)
    return Explained((name,), [member], [count])


def _refuse_others(module: nn.Module, layout: FfnLayout, sizes: set[int], width: int, hidden: int) -> None:
    """Refuse tensors of the channels' size that nothing explains, and code that goes over all channels."""
    for name, tensor in _tensors_near(module, layout):
        # Norms of the hidden states may have the same size; those between the layers are in the layouts.
        if not sizes.isdisjoint(tensor.shape) and not (width == hidden and "norm" in name.lower()):
            raise UnaccountedError(
                f"{name} of shape {tuple(tensor.shape)} may depend on the {width} intermediate channels, and no "
                "layout says how"
            )
    reductions = find_reads(type(module)).calls & _REDUCTIONS
    others = tensors_outside(module, (*layout.first, layout.second, *layout.between))
    if reductions and all(tensor.dim() < 2 for _, tensor in others):  # else they may be those of other parts
        raise UnaccountedError(
            f"its code calls {', '.join(sorted(reductions))}, so that channels may depend on one another"
        )


def _read_attributes(module: nn.Module, width: int, units: int, hidden: int) -> Iterator[Count]:
    """The attributes that count the channels; of a single channel none is removed, so that nothing else has to."""
    reads = find_reads(type(module))
    for name, value in module.__dict__.items():
        if type(value) is not int or value not in (width, 2 * width):
            continue
        if name in CHANNEL_COUNTS and value == width:
            yield Count("", name, width // units)
        elif value != hidden and units > 1 and (reads.names is None or name in reads.names):
            if name in reads.used:
                raise UnaccountedError(f"its code reads {name} = {value}, which may count the intermediate channels")
            yield Count("", name, value // units)
    config = module.__dict__.get("config")
    for name in sorted(reads.config):
        if name in CHANNEL_COUNTS and get_field(config, name) == width:
            yield Count("", f"config.{name}", width // units)


def _tensors_near(module: nn.Module, layout: FfnLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that may lie between the two layers: beside them, but not inside other modules such as attention."""
    explained = (*layout.first, layout.second, *layout.between)
    roots = {name.partition(".")[0] for name in explained}
    for name, tensor in tensors_outside(module, explained):
        if name.count(".") < 2 or name.partition(".")[0] in roots or name.startswith(explained):
            yield name, tensor
