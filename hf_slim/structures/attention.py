"""From a module that matches a layout of attention to its structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..modeling_hf_slim import can_infer, written_class
from .linear_layers import Layer, find_child, find_layer, find_tensor, join, tensors_outside
from .projection_layouts import (
    FIXED,
    GROUP_SIZES,
    HEAD_LAYERS,
    HEAD_NORMS,
    HEAD_SIZES,
    HEAD_TENSORS,
    HEAD_WIDTHS,
    KEY_VALUE_HEAD_COUNTS,
    QUERY_HEAD_COUNTS,
    Fused,
    MhaLayout,
)
from .rms_norms import find_epsilon, fold_norm
from .source_code import Reads, find_reads
from .structure import Count, Member, Structure, UnaccountedError, blocks, spread
from .unit_counts import get_field

_ABOUT_HEADS = re.compile("head|embed|hidden|inner|dim|kv|width|d_model|channels")
_GROUPS_LEFT = "hf_slim_key_value_heads"
"""Attribute of grouped-query attention that has been slimmed: one group that is left is not multi-query attention."""


@dataclass(frozen=True)
class _Heads:
    """The sizes of an attention module.

    Query heads, key-value heads, units, parts in each of which a unit has a head, and the width of all query heads.
    """

    queries: int
    keys: int
    units: int
    copies: int
    width: int

    @property
    def size(self) -> int:
        """The width of one head's output."""
        return self.width // self.queries

    @property
    def shared(self) -> bool:
        """Whether all query heads share one key-value head, so that query heads are the units."""
        return self.keys < self.units


def matches_mha(module: nn.Module, layout: MhaLayout) -> bool:
    """Whether a module has the children (and the attribute) of a layout."""
    if layout.having is not None and not hasattr(module, layout.having):
        return False
    return _output_path(module, layout) is not None and all(
        find_layer(module, _name(part)) is not None for part in layout.inputs
    )


def owner_of(layout: MhaLayout) -> str:
    """The path of the module that makes query, key and value in a layout."""
    return _name(layout.inputs[0]).rpartition(".")[0]


def read_mha(path: str, module: nn.Module, layout: MhaLayout) -> Structure:
    """Read the structure of an attention module.

    Args:
        path: Dotted name of the module.
        module: The module.
        layout: A layout that it matches.

    Returns:
        The structure, whose units are attention heads or key-value groups.

    Raises:
        UnaccountedError: If something in the module is not explained by the layout.
    """
    output_path = _output_path(module, layout)
    assert output_path is not None
    output = find_layer(module, output_path)
    assert output is not None
    if output_path in module._parameters:  # heads and their widths are dimensions of their own
        output = replace(output, inputs=module.get_parameter(output_path).shape[1], input_dim=1)
    owner_path = owner_of(layout)
    owner = module.get_submodule(owner_path)
    layers = {_name(part): find_layer(module, _name(part)) for part in layout.inputs}
    copies = max(
        output.groups,
        *(part.copies for part in layout.inputs if isinstance(part, Fused)),
        *(layer.groups for layer in layers.values() if layer is not None),
        1,
    )
    if owner_path.partition(".")[0] in find_reads(type(module)).replaced:
        raise UnaccountedError(f"its code replaces {owner_path} by a new module, which would have all heads again")
    heads = _count_heads(module, owner, layout, output, copies)
    members: list[Member] = []
    counts: list[Count] = []
    known = {output_path}
    for number, part in enumerate(layout.inputs):
        layer = layers[_name(part)]
        assert layer is not None
        known.add(_name(part))
        for index in _positions(part, layer, heads, owns=not heads.shared or len(layout.inputs) < 3 or number == 0):
            members += layer.members(path, index, "input")
    positions = blocks(heads.units, output.inputs // copies // heads.units)
    if output.groups == 1:
        positions = spread(heads.units, output.inputs, copies)
    members += output.members(path, positions, "output")
    for prefix in dict.fromkeys(("", owner_path)):
        members += _read_extras(path, prefix, module, heads, known)
        members += _read_norms(path, prefix, module, heads, counts, known)
        known |= {join(prefix, name) for name in FIXED}
    paths = (output_path, *layers)
    roots = tuple(f"{name.partition('.')[0]}." for name in paths) if all("." in name for name in paths) else ("",)
    for name, tensor in tensors_outside(module, known):
        if name.startswith(roots):
            raise UnaccountedError(
                f"{name} of shape {tuple(tensor.shape)} may depend on the {heads.units} heads, and no layout says how"
            )
    for prefix in dict.fromkeys(("", owner_path)):
        counts += _read_attributes(join(path, prefix), module.get_submodule(prefix), heads, layout.widths)
    if 1 < heads.keys < heads.queries:
        counts.append(Count(join(path, owner_path), _GROUPS_LEFT, 1))
    reshaping = tuple(
        dict.fromkeys(
            join(path, prefix)
            for prefix in ("", owner_path)
            if find_reads(type(module.get_submodule(prefix))).input_width is not None
        )
    )
    return Structure(join(path, output_path), "mha", heads.units, tuple(members), tuple(counts), reshaping)


def _output_path(module: nn.Module, layout: MhaLayout) -> str | None:
    return next((name for name in layout.outputs if find_layer(module, name) is not None), None)


def _name(part: str | Fused) -> str:
    return part.layer if isinstance(part, Fused) else part


def _attribute(owner: nn.Module, names: Iterable[str]) -> int | None:
    for name in names:
        value = owner.__dict__.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _count_heads(module: nn.Module, owner: nn.Module, layout: MhaLayout, output: Layer, copies: int) -> _Heads:
    """How many heads there are, by the attributes that tell it and the widths of the layers."""
    width = output.inputs
    queries = _attribute(owner, QUERY_HEAD_COUNTS)
    size = _attribute(owner, HEAD_SIZES)
    if queries is None and size is None:
        read = find_reads(type(owner)).config
        queries = next((get_field(owner.config, name) for name in QUERY_HEAD_COUNTS if name in read), None)
    if queries is None:
        if size is None:
            known = ", ".join((*HEAD_SIZES, *QUERY_HEAD_COUNTS))
            raise UnaccountedError(f"none of its attributes tells the width of a head (looked for {known})")
        queries = width // size
    keys = _attribute(owner, KEY_VALUE_HEAD_COUNTS)
    group = _attribute(owner, GROUP_SIZES)
    if keys is None and group is not None:
        keys = queries // group
    if keys is None:
        keys = queries
        if len(layout.inputs) == 3 and size is not None:
            layer = find_layer(module, _name(layout.inputs[1]))
            assert layer is not None
            keys = min(queries, layer.outputs // size)
    if not queries or not keys or width % queries or queries % keys or queries % copies:
        raise UnaccountedError(
            f"{queries} query heads and {keys} key-value heads do not explain the {width} values that "
            f"{_output_path(module, layout)} reads"
        )
    units = queries if keys == 1 and _GROUPS_LEFT not in owner.__dict__ else keys
    return _Heads(queries, keys, units // copies, copies, width)


def _positions(part: str | Fused, layer: Layer, heads: _Heads, *, owns: bool) -> list[torch.LongTensor]:
    """Which outputs of a layer belong to each unit, by role; a shared key-value head belongs to none."""
    if isinstance(part, str):
        return [spread(heads.units, layer.outputs, heads.copies)] if owns else []
    counts = {"q": heads.queries, "k": heads.keys, "v": heads.keys}
    total = sum(counts[role] for role in part.parts)
    if layer.outputs % total:
        raise UnaccountedError(f"{part.layer} makes {layer.outputs} values, which are not those of {total} heads")
    size = layer.outputs // total
    found: dict[str, list[torch.Tensor]] = {}
    start = 0
    for _ in range(part.copies):
        for role in part.parts:
            span = counts[role] * size // part.copies
            if role == "q" or not heads.shared:
                if part.by_unit and not heads.shared:
                    ranges = blocks(heads.units, layer.outputs // heads.units, start=start // heads.units)
                    found.setdefault(role, []).append(ranges[:, : span // heads.units])
                else:
                    found.setdefault(role, []).append(spread(heads.units, span, 1, start))
            start += span
    return [torch.cat(ranges, dim=1) for ranges in found.values()]  # type: ignore[misc]


def _read_extras(path: str, prefix: str, module: nn.Module, heads: _Heads, known: set[str]) -> Iterator[Member]:
    """The layers and parameters beside query, key and value that belong to heads."""
    for name in HEAD_LAYERS:
        full = join(prefix, name)
        layer = find_layer(module, full)
        if layer is not None and full not in known:
            known.add(full)
            yield from layer.members(path, spread(heads.units, layer.outputs, heads.copies), "extra")
    for name, dim in HEAD_TENSORS.items():
        full = join(prefix, name)
        tensor = find_tensor(module, full)
        if tensor is not None and full not in known:
            known.add(full)
            yield Member(join(path, full), dim, spread(heads.units, tensor.shape[dim], heads.copies), "extra")


def _read_norms(
    path: str, prefix: str, module: nn.Module, heads: _Heads, counts: list[Count], known: set[str]
) -> Iterator[Member]:
    """The norms over heads: one weight for all, which stays, one for each, or one norm over all heads together."""
    for name in HEAD_NORMS:
        full = join(prefix, name)
        norm = find_child(module, full)
        if norm is None or full in known or norm._modules:
            continue
        known.add(full)
        for leaf, tensor in norm.named_parameters():
            size = tensor.shape[0]
            if tensor.dim() > 1:
                if size not in (heads.queries, heads.keys):
                    raise UnaccountedError(f"{full}.{leaf} of shape {tuple(tensor.shape)} is not for each head")
                if size > 1:
                    yield Member(join(path, full, leaf), 0, spread(heads.units, size, heads.copies), "extra")
            elif heads.units > 1 and heads.size < size and size in (heads.width, heads.keys * heads.size):
                epsilon = find_epsilon(norm)
                if epsilon is None:
                    raise UnaccountedError(
                        f"{full} normalizes all heads together, and not as an RMS norm does: what it gives for the "
                        "heads that are kept would change"
                    )
                member, count = fold_norm(join(path, full), norm, epsilon, heads.units)
                counts.append(count)
                yield member


def _read_attributes(path: str, module: nn.Module, heads: _Heads, widths: tuple[str, ...]) -> Iterator[Count]:
    """The attributes that depend on the number of heads; one that the code reads and nothing explains is refused."""
    reads = find_reads(type(module))
    _refuse_code(module, reads)
    config = module.__dict__.get("config")
    fields = {f"config.{name}": get_field(config, name) for name in sorted(reads.config)}
    for name, value in {**module.__dict__, **fields}.items():
        if type(value) is not int:
            continue
        is_read = name in fields or reads.names is None or name in reads.names
        if name in widths and value == heads.width:
            yield Count(path, name, heads.width // heads.units)
            continue
        count = _count(path, name, value, heads, reads, is_read=is_read)
        if count is not None:
            yield count


def _count(path: str, name: str, value: int, heads: _Heads, reads: Reads, *, is_read: bool) -> Count | None:
    """How an attribute depends on the number of units, if it does."""
    field = name.removeprefix("config.")
    for names, total in (
        (QUERY_HEAD_COUNTS, heads.queries),
        (KEY_VALUE_HEAD_COUNTS, heads.keys),
        (GROUP_SIZES, heads.queries // heads.keys),
        (HEAD_WIDTHS, heads.width),
    ):
        if field in names:
            if value != total and is_read:
                raise UnaccountedError(f"its attribute {name} is {value}, but the weights say {total}")
            stays = names is KEY_VALUE_HEAD_COUNTS if heads.shared else names is GROUP_SIZES
            return None if stays or value != total else Count(path, name, total // heads.units)
    if not is_read or not _ABOUT_HEADS.search(name) or (field in HEAD_SIZES and value == heads.size):
        return None
    keys = heads.keys * heads.size
    if heads.shared and value == keys:
        return None
    if reads.input_width is not None and value == heads.width and name in reads.used:
        return None  # the code compares the width of its input with it
    if value in (heads.width, keys, heads.width + 2 * keys, 3 * heads.width) and value > heads.size:
        if name in reads.used or name not in (reads.names or ()) or (heads.shared and value != heads.width):
            raise UnaccountedError(
                f"its code reads {name} = {value}, which may be a width of its {heads.queries} heads"
            )
        return Count(path, name, value // heads.units)
    return None


def _refuse_code(module: nn.Module, reads: Reads) -> None:
    if reads.input_width is not None and not can_infer(written_class(type(module))):
        raise UnaccountedError(
            f"its code gives the heads' outputs the width of its input ({reads.input_width}), so they cannot get fewer"
        )
    if "alibi" in reads.arguments and get_field(module.__dict__.get("config"), "alibi") is not False:
        raise UnaccountedError(
            "it adds ALiBi, whose slopes the model makes from the number of heads: the kept heads would get others"
        )
