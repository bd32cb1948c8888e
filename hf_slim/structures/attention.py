"""From a module that matches a layout of attention to its structure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..modeling_hf_slim import can_infer, written_class
from .layout_rows import Fused, MhaLayout
from .linear_layers import Layer, find_child, find_layer, find_tensor, join, tensors_outside
from .projection_names import (
    FIXED,
    GROUP_SIZES,
    HEAD_LAYERS,
    HEAD_NORMS,
    HEAD_SIZES,
    HEAD_TENSORS,
    HEAD_WIDTHS,
    KEY_VALUE_HEAD_COUNTS,
    QUERY_HEAD_COUNTS,
)
from .rms_norms import find_epsilon, fold_norm
from .source_code import Reads, find_reads
from .structure import Count, Explained, Member, Structure, UnaccountedError, blocks, spread
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

    def share(self, positions: int) -> torch.LongTensor:
        """The index of positions of which every unit owns an equal range in each part."""
        return spread(self.units, positions, self.copies)


def matches_mha(module: nn.Module, layout: MhaLayout) -> bool:
    """Whether a module has the children (and the attribute) of a layout."""
    return (layout.having is None or hasattr(module, layout.having)) and bool(_find_layers(module, layout))


def owner_of(layout: MhaLayout) -> str:
    """The path of the module that makes query, key and value in a layout."""
    return _name(layout.inputs[0]).rpartition(".")[0]


def read_mha(module: nn.Module, layout: MhaLayout) -> Structure:
    """Read the structure of an attention module.

    Args:
        module: The module.
        layout: A layout that it matches.

    Returns:
        The structure, its names relative to the module; its units are attention heads or key-value groups.

    Raises:
        UnaccountedError: If something in the module is not explained by the layout.
    """
    owner = owner_of(layout)
    if owner.partition(".")[0] in find_reads(type(module)).replaced:
        raise UnaccountedError(f"its code replaces {owner} by a new module, which would have all heads again")
    layers = _find_layers(module, layout)
    heads = _count_heads(layout, layers, module.get_submodule(owner))
    prefixes = tuple(dict.fromkeys(("", owner)))
    found = [*_read_layers(layout, layers, heads)]
    for prefix in prefixes:
        found += _read_extras(module, prefix, heads, layers)
    fixed = (join(prefix, name) for prefix in prefixes for name in FIXED)
    _refuse_others(module, layers, {*fixed, *(name for part in found for name in part.names)}, heads)
    counts = [count for part in found for count in part.counts]
    for prefix in prefixes:
        counts += _read_attributes(prefix, module.get_submodule(prefix), heads, layout.widths)
    if 1 < heads.keys < heads.queries:
        counts.append(Count(owner, _GROUPS_LEFT, 1))
    members = tuple(member for part in found for member in part.members)
    reshaping = tuple(p for p in prefixes if find_reads(type(module.get_submodule(p))).input_width is not None)
    return Structure([*layers][-1], "mha", heads.units, members, tuple(counts), reshaping)


def _name(part: str | Fused) -> str:
    return part.layer if isinstance(part, Fused) else part


def _find_layers(module: nn.Module, layout: MhaLayout) -> dict[str, Layer]:
    """The layers for query, key and value and, last, the output projection, by path; none if one is not there."""
    output = next((name for name in layout.outputs if find_layer(module, name) is not None), "")
    found = {name: find_layer(module, name) for name in (*map(_name, layout.inputs), output)}
    layers = {name: layer for name, layer in found.items() if layer is not None}
    if len(layers) < len(found):
        return {}
    if output in module._parameters:  # heads and their widths are dimensions of their own
        layers[output] = replace(layers[output], inputs=module.get_parameter(output).shape[1], input_dim=1)
    return layers


def _attribute(owner: nn.Module, names: Iterable[str]) -> int | None:
    for name in names:
        value = owner.__dict__.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _count_heads(layout: MhaLayout, layers: dict[str, Layer], owner: nn.Module) -> _Heads:
    """How many heads there are, by the attributes that tell it and the widths of the layers."""
    fused = (part.copies for part in layout.inputs if isinstance(part, Fused))
    copies = max(*fused, *(layer.groups for layer in layers.values()))
    output, width = [(name, layer.inputs) for name, layer in layers.items()][-1]
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
            keys = min(queries, layers[_name(layout.inputs[1])].outputs // size)
    if not queries or not keys or width % queries or queries % keys or queries % copies:
        raise UnaccountedError(
            f"{queries} query heads and {keys} key-value heads do not explain the {width} values that {output} reads"
        )
    units = queries if keys == 1 and _GROUPS_LEFT not in owner.__dict__ else keys
    return _Heads(queries, keys, units // copies, copies, width)


def _read_layers(layout: MhaLayout, layers: dict[str, Layer], heads: _Heads) -> Iterator[Explained]:
    """The layers for query, key and value and the output projection."""
    *inputs, output = layers.items()
    for number, (part, (name, layer)) in enumerate(zip(layout.inputs, inputs, strict=True)):
        owns = not heads.shared or len(inputs) < 3 or number == 0
        found = (layer.members(index, "input") for index in _positions(part, layer, heads, owns=owns))
        yield Explained((name,), [member for members in found for member in members])
    name, layer = output
    group = blocks(heads.units, layer.inputs // heads.copies // heads.units)
    yield Explained((name,), layer.members(group if layer.groups > 1 else heads.share(layer.inputs), "output"))


def _positions(part: str | Fused, layer: Layer, heads: _Heads, *, owns: bool) -> list[torch.LongTensor]:
    """Which outputs of a layer belong to each unit, by role; a shared key-value head belongs to none."""
    if isinstance(part, str):
        return [heads.share(layer.outputs)] if owns else []
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


def _read_extras(module: nn.Module, prefix: str, heads: _Heads, taken: Collection[str]) -> Iterator[Explained]:
    """The layers, parameters and norms beside query, key and value that belong to heads."""
    for name in (join(prefix, name) for name in HEAD_LAYERS):
        layer = find_layer(module, name)
        if layer is not None and name not in taken:
            yield Explained((name,), layer.members(heads.share(layer.outputs), "extra"))
    for leaf, dim in HEAD_TENSORS.items():
        name = join(prefix, leaf)
        tensor = find_tensor(module, name)
        if tensor is not None:
            yield Explained((name,), [Member(name, dim, heads.share(tensor.shape[dim]), "extra")])
    for name in (join(prefix, name) for name in HEAD_NORMS):
        norm = find_child(module, name)
        if norm is not None and name not in taken and not norm._modules:
            yield _read_norm(name, norm, heads)


def _read_norm(name: str, norm: nn.Module, heads: _Heads) -> Explained:
    """One weight for all heads, which stays, one for each, or one norm over all heads together."""
    members, counts = [], []
    for leaf, tensor in norm.named_parameters():
        size = tensor.shape[0]
        if tensor.dim() > 1:
            if size not in (heads.queries, heads.keys):
                raise UnaccountedError(f"{name}.{leaf} of shape {tuple(tensor.shape)} is not for each head")
            if size > 1:
                members.append(Member(join(name, leaf), 0, heads.share(size), "extra"))
        elif heads.units > 1 and heads.size < size and size in (heads.width, heads.keys * heads.size):
            epsilon = find_epsilon(norm)
            if epsilon is None:
                raise UnaccountedError(
                    f"{name} normalizes all heads together, and not as an RMS norm does: what it gives for the "
                    "heads that are kept would change"
                )
            member, count = fold_norm(name, norm, epsilon, heads.units)
            members.append(member)
            counts.append(count)
    return Explained((name,), members, counts)


def _refuse_others(module: nn.Module, layers: Collection[str], explained: Collection[str], heads: _Heads) -> None:
    """Refuse tensors that nothing explains; beside layers that all lie deeper, those of other parts are others'."""
    roots = tuple(f"{name.partition('.')[0]}." for name in layers) if all("." in name for name in layers) else ("",)
    for name, tensor in tensors_outside(module, explained):
        if name.startswith(roots):
            raise UnaccountedError(
                f"{name} of shape {tuple(tensor.shape)} may depend on the {heads.units} heads, and no layout says how"
            )


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
