"""From a model to the structures that can be slimmed, and to the modules that cannot, with the reason."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .layouts import (
    CHANNEL_COUNTS,
    FFN_LAYOUTS,
    HEAD_SIZES,
    HEAD_WIDTHS,
    KEY_VALUE_HEAD_COUNTS,
    MHA_LAYOUTS,
    QUERY_HEAD_COUNTS,
    FfnLayout,
    MhaLayout,
    Part,
)
from .structures import Count, Discovery, Kind, Member, Role, Skipped, Structure, blocks


class UnaccountedError(ValueError):
    """A module matches a layout, but something in it is not explained by the layout."""


def find_structures(model: nn.Module) -> Discovery:
    """Find every feed-forward network and every attention module that can be slimmed exactly.

    Reads names, shapes and attributes only: no forward pass, no data, any device including meta.

    Args:
        model: A transformers model (or any module that contains the same layouts).

    Returns:
        The structures found, and the modules skipped with the reasons.
    """
    structures: list[Structure] = []
    skipped: list[Skipped] = []
    joint: dict[str, list[Structure]] = {}
    for path, module in model.named_modules():
        for mha in MHA_LAYOUTS:
            if _matches(module, (mha.query.layer, mha.key.layer, mha.value.layer, mha.output)):
                try:
                    found = _read_mha(path, module, mha)
                except UnaccountedError as reason:
                    skipped.append(Skipped(path, "mha", str(reason)))
                    break
                if mha.joint is not None and hasattr(module, mha.joint):
                    joint.setdefault(_name_in_stack(model, found.name), []).append(found)
                else:
                    structures.append(found)
                break
        for ffn in FFN_LAYOUTS:
            if _matches(module, (*ffn.first, ffn.second)):
                try:
                    structures.append(_read_ffn(path, module, ffn))
                except UnaccountedError as reason:
                    skipped.append(Skipped(path, "ffn", str(reason)))
                break
    for name, parts in joint.items():
        if len({part.units for part in parts}) > 1:
            skipped.append(
                Skipped(name, "mha", "blocks that share one attention bias differ in their numbers of heads")
            )
            continue
        members = tuple(member for part in parts for member in part.members)
        counts = tuple(count for part in parts for count in part.counts)
        structures.append(Structure(name, "mha", parts[0].units, members, counts))
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    structures.sort(key=lambda s: order[_first_module(s)])
    return Discovery(tuple(structures), tuple(skipped))


def require_structures(model: nn.Module, found: Discovery, kind: Kind | None = None) -> tuple[Structure, ...]:
    """The structures found, or an error that says what was looked at.

    Args:
        model: The model.
        found: What `find_structures` found in it.
        kind: `ffn` or `mha`, or None for both.

    Returns:
        The structures of that kind, at least one.

    Raises:
        ValueError: If there are none; the message lists what was skipped and why.
    """
    structures = found.structures if kind is None else found.of_kind(kind)
    if structures:
        return structures
    what = {"ffn": "feed-forward network", "mha": "attention module", None: "structure"}[kind]
    skipped = [s for s in found.skipped if kind is None or s.kind == kind]
    reasons = "".join(f"\n  {s.name}: {s.reason}" for s in skipped)
    classes = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
    looked = (
        f"Skipped:{reasons}" if skipped else f"Looked at modules of the classes {classes}; none has a known layout"
    )
    raise ValueError(f"{type(model).__name__} has no {what} that can be slimmed. {looked}")


def exclude_structures(structures: Sequence[Structure], patterns: Iterable[str]) -> tuple[Structure, ...]:
    """Leave out the structures that patterns name.

    Args:
        structures: What was found.
        patterns: Shell-style patterns or regular expressions. One matches a structure if it matches the whole dotted
            name of one of its layers or of a module around one, or the end of such a name after a dot.

    Returns:
        The structures that no pattern matches.

    Raises:
        ValueError: If a pattern matches nothing; the message lists the names there are.
    """
    left = tuple(structures)
    for pattern in patterns:
        test = _compile_pattern(pattern)
        matched = [s for s in structures if any(test.fullmatch(path) for path in _paths(s))]
        if not matched:
            names = ", ".join(s.name for s in structures)
            raise ValueError(
                f"slim_exclude: the pattern {pattern!r} matches no module of a structure. A pattern is a shell-style "
                "pattern or a regular expression for a module's whole dotted name or the end of it. The structures "
                f"are: {names}."
            )
        left = tuple(s for s in left if s not in matched)
    return left


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern).pattern
    except re.error:
        return re.compile(rf"(?:.*\.)?(?:{fnmatch.translate(pattern)})")
    return re.compile(rf"(?:.*\.)?(?:{expression})|(?:.*\.)?(?:{fnmatch.translate(pattern)})")


def _paths(structure: Structure) -> set[str]:
    paths = {structure.name}
    for member in structure.members:
        parts = member.tensor.split(".")[:-1]
        paths.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return paths


def _first_module(structure: Structure) -> str:
    return structure.outputs[0].tensor.rpartition(".")[0]


def _name_in_stack(model: nn.Module, name: str) -> str:
    """The name with the block's number in the nearest stack (a `PreTrainedModel`) replaced by `*`."""
    parts = name.split(".")
    stack = max(
        (end for end in range(len(parts)) if isinstance(model.get_submodule(".".join(parts[:end])), PreTrainedModel)),
        default=0,
    )
    block = next((i for i in range(stack, len(parts)) if parts[i].isdigit()), None)
    return name if block is None else ".".join([*parts[:block], "*", *parts[block + 1 :]])


def _matches(module: nn.Module, paths: Iterable[str]) -> bool:
    return all(_is_linear(_child(module, path)) for path in paths)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _is_linear(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Linear):
        return module.weight.shape == (module.out_features, module.in_features)
    return isinstance(module, Conv1D)


def _dims(layer: nn.Module) -> tuple[int, int]:
    """The dimensions of a layer's weight that are its output and its input."""
    return (1, 0) if isinstance(layer, Conv1D) else (0, 1)


def _width(layer: nn.Module, *, output: bool) -> int:
    weight = layer.get_parameter("weight")
    return weight.shape[_dims(layer)[0 if output else 1]]


def _layer_members(path: str, layer: nn.Module, index: torch.LongTensor, role: Role) -> list[Member]:
    """The members of a layer whose outputs (`input`) or inputs (`output`) belong to units."""
    output_dim, input_dim = _dims(layer)
    if role == "output":
        return [Member(f"{path}.weight", input_dim, index, role)]
    members = [Member(f"{path}.weight", output_dim, index, role)]
    if getattr(layer, "bias", None) is not None:
        members.append(Member(f"{path}.bias", 0, index, "extra"))
    return members


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _read_ffn(path: str, module: nn.Module, layout: FfnLayout) -> Structure:
    second = _child(module, layout.second)
    assert second is not None
    units = _width(second, output=False)
    members: list[Member] = []
    for name in layout.first:
        layer = _child(module, name)
        assert layer is not None
        if _width(layer, output=True) != units:
            raise UnaccountedError(
                f"{name} makes {_width(layer, output=True)} channels, but {layout.second} reads {units}"
            )
        members += _layer_members(_join(path, name), layer, blocks(units, 1), "input")
    members += _layer_members(_join(path, layout.second), second, blocks(units, 1), "output")
    if units != _width(second, output=True):  # else every norm of the hidden states has this size
        for name, tensor in _tensors_near(module, layout):
            if units in tensor.shape:
                raise UnaccountedError(
                    f"{name} of shape {tuple(tensor.shape)} may depend on the {units} intermediate channels, and no "
                    "layout says how"
                )
    return Structure(_join(path, layout.second), "ffn", units, tuple(members), _channel_counts(path, module, units))


def _channel_counts(path: str, module: nn.Module, units: int) -> tuple[Count, ...]:
    return tuple(Count(path, name, 1) for name in CHANNEL_COUNTS if module.__dict__.get(name) == units)


def _read_mha(path: str, module: nn.Module, layout: MhaLayout) -> Structure:
    output = _child(module, layout.output)
    assert output is not None
    owner_path = layout.query.layer.rpartition(".")[0]
    owner = module.get_submodule(owner_path)
    query_width, key_width, value_width = (
        _part_width(module, part) for part in (layout.query, layout.key, layout.value)
    )
    head_size = _head_size(owner, query_width)
    query_heads, units = query_width // head_size, key_width // head_size
    if query_width % head_size or key_width % head_size or key_width != value_width or query_heads % units:
        raise UnaccountedError(
            f"query, key and value have widths {query_width}, {key_width} and {value_width}, which heads of "
            f"{head_size} do not explain"
        )
    if _width(output, output=False) != query_width:
        raise UnaccountedError(
            f"{layout.output} reads {_width(output, output=False)} values, but the query heads make {query_width}"
        )
    group = blocks(units, query_width // units)
    single = blocks(units, head_size)
    members: list[Member] = []
    for part, index, width in (
        (layout.query, group, query_width),
        (layout.key, single, key_width),
        (layout.value, single, value_width),
    ):
        layer = _child(module, part.layer)
        assert layer is not None
        shifted = torch.LongTensor(index + part.number * width)
        members += _layer_members(_join(path, part.layer), layer, shifted, "input")
    members += _layer_members(_join(path, layout.output), output, group, "output")
    for name in layout.per_head:
        table = _child(module, name)
        if table is not None:
            if not isinstance(table, nn.Embedding) or table.weight.shape[1] != units:
                raise UnaccountedError(f"{name} is not an embedding with one column for each of the {units} heads")
            members.append(Member(_join(path, name, "weight"), 1, blocks(units, 1), "extra"))
    layers = {layout.query.layer, layout.key.layer, layout.value.layer, layout.output}
    for name, tensor in _tensors_outside(module, (*layers, *layout.fixed, *layout.per_head)):
        raise UnaccountedError(
            f"{name} of shape {tuple(tensor.shape)} may depend on the {units} heads, and no layout says how"
        )
    counts = _head_counts(_join(path, owner_path), owner, units, query_heads, head_size)
    return Structure(_join(path, layout.output), "mha", units, tuple(members), counts)


def _part_width(module: nn.Module, part: Part) -> int:
    layer = _child(module, part.layer)
    assert layer is not None
    width = _width(layer, output=True)
    if width % part.of:
        raise UnaccountedError(f"{part.layer} makes {width} values, which are not {part.of} equal parts")
    return width // part.of


def _head_size(owner: nn.Module, query_width: int) -> int:
    for name in HEAD_SIZES:
        size = owner.__dict__.get(name)
        if isinstance(size, int) and size > 0:
            return size
    for name in QUERY_HEAD_COUNTS:
        heads = owner.__dict__.get(name)
        if isinstance(heads, int) and heads > 0:
            return query_width // heads
    known = ", ".join((*HEAD_SIZES, *QUERY_HEAD_COUNTS))
    raise UnaccountedError(f"none of its attributes tells the width of a head (looked for {known})")


def _head_counts(path: str, owner: nn.Module, units: int, query_heads: int, head_size: int) -> tuple[Count, ...]:
    counts = []
    for names, total in (
        (QUERY_HEAD_COUNTS, query_heads),
        (KEY_VALUE_HEAD_COUNTS, units),
        (HEAD_WIDTHS, query_heads * head_size),
    ):
        for name in names:
            if name not in owner.__dict__:
                continue
            if owner.__dict__[name] != total:
                raise UnaccountedError(f"its attribute {name} is {owner.__dict__[name]}, but the weights say {total}")
            counts.append(Count(path, name, total // units))
    return tuple(counts)


def _tensors_outside(module: nn.Module, explained: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module that lie in none of the children explained."""
    inside = tuple(f"{name}." for name in explained)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith(inside):
            yield name, tensor


def _tensors_near(module: nn.Module, layout: FfnLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that may lie between the two layers: beside them, but not inside other modules such as attention."""
    roots = {path.partition(".")[0] for path in (*layout.first, layout.second)}
    for name, tensor in _tensors_outside(module, (*layout.first, layout.second, *layout.fixed)):
        if name.count(".") < 2 or name.partition(".")[0] in roots:
            yield name, tensor
