"""From a model to the structures that can be slimmed, and to the modules that cannot, with the reason."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from .attention import matches_mha, owner_of, read_mha
from .custom_code import find_hook, find_strange
from .feed_forward import matches_ffn, read_ffn
from .layout_rows import FfnLayout, MhaLayout
from .linear_layers import find_child, find_layer, join
from .peft_adapters import find_obstacle
from .projection_names import CONFIG_HEADS, QUERY_HEAD_COUNTS, layouts_of
from .shared_position_biases import join_blocks, join_by_tables, name_in_stack
from .source_code import find_mentioned, find_reads
from .structure import Discovery, Kind, Skipped, Structure, UnaccountedError, get_module, get_tensor
from .unit_counts import get_field

_HEAD_COUNTS = frozenset((*CONFIG_HEADS, *QUERY_HEAD_COUNTS))
_LARGEST = 8
"""How many modules an error names."""
_KINDS: tuple[Kind, ...] = ("ffn", "mha")
_CALLED = re.compile(r"Attention|Attn|MLP|Mlp|FeedForward|FFN|Expert")


def find_structures(model: nn.Module) -> Discovery:
    """Find every feed-forward network and every attention module that can be slimmed exactly.

    Reads names, shapes, attributes and the modules' source code only: no forward pass, no data, any device including
    meta.

    Args:
        model: A transformers model (or any module that contains the same layouts).

    Returns:
        The structures found, and the modules skipped with the reasons.

    Raises:
        ValueError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"A model (a torch.nn.Module) is needed, got {type(model).__name__}: load or build it first.")
    found = join_by_tables(model, join_blocks(_read_modules(model)))
    for find_reason in (find_obstacle, partial(_find_shared, _find_names(model)), _find_read_above):
        found = _refuse(model, found, find_reason)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    structures = sorted(found.structures, key=lambda s: order[_first_module(s, order)])
    return Discovery(tuple(structures), (*found.skipped, *_find_unknown(model, found)))


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
    looked = f"Skipped:{reasons}" if skipped else f"Nothing in it looks like one. {_describe_largest(model)}"
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
        tests = _compile_pattern(pattern)
        matched = [s for s in structures if any(test.fullmatch(path) for test in tests for path in _paths(s))]
        if not matched:
            names = ", ".join(s.name for s in structures)
            raise ValueError(
                f"slim_exclude: the pattern {pattern!r} matches no module of a structure. A pattern is a shell-style "
                "pattern or a regular expression for a module's whole dotted name or the end of it. The structures "
                f"are: {names}."
            )
        left = tuple(s for s in left if s not in matched)
    return left


def _describe_largest(model: nn.Module) -> str:
    """The names, classes and sizes of the largest modules that have parameters of their own."""
    sizes = {
        name: sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in module._parameters.values() if p is not None)
        for name, module in model.named_modules()
    }
    largest = sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name])[:_LARGEST]
    if not largest:
        return "It has no parameters at all."
    rows = (f"\n  {name or 'itself'} ({type(find_child(model, name)).__name__}): {sizes[name]:,}" for name in largest)
    return f"Its largest modules and their numbers of parameters:{''.join(rows)}"


def _compile_pattern(pattern: str) -> list[re.Pattern[str]]:
    tests = [re.compile(fnmatch.translate(pattern))]
    with contextlib.suppress(re.error):
        tests.append(re.compile(pattern))
    return tests


def _paths(structure: Structure) -> set[str]:
    """The dotted names of a structure's layers and of the modules around them, and every end of each."""
    paths = {tuple(structure.name.split("."))}
    for member in structure.members:
        parts = tuple(member.tensor.split(".")[:-1])
        paths.update(parts[:end] for end in range(1, len(parts) + 1))
    return {".".join(path[start:]) for path in paths for start in range(len(path))}


def _read_modules(model: nn.Module) -> Discovery:
    """What the modules are made of that match a layout; those in blocks that share a bias have a name in common."""
    mha, ffn = layouts_of(MhaLayout), layouts_of(FfnLayout)
    known = frozenset().union(*(row.roots for row in mha), *(row.roots for row in ffn))
    found: list[Structure | Skipped] = []
    for path, module in model.named_modules():
        children = known.intersection((*module._modules, *module._parameters))
        if children:
            found += _read_attention(model, path, module, [row for row in mha if row.roots & children])
            found += _read_networks(model, path, module, [row for row in ffn if row.roots & children])
    # A row for a module and one for the module around it may describe the same layers: the outer one is taken.
    outer = {part.outputs[0].tensor: part for part in reversed(found) if isinstance(part, Structure)}
    return Discovery.of(part for part in found if isinstance(part, Skipped) or part is outer[part.outputs[0].tensor])


def _read_attention(
    model: nn.Module, path: str, module: nn.Module, layouts: Iterable[MhaLayout]
) -> Iterator[Structure | Skipped]:
    """The structure of the first layout that a module matches."""
    for layout in layouts:
        if matches_mha(module, layout) and not _matches_inside(module, layout):
            found = _read(model, path, "mha", partial(read_mha, module, layout))
            if isinstance(found, Structure) and layout.joint is not None and hasattr(module, layout.joint):
                found = replace(found, name=name_in_stack(model, found.name))
            yield found
            return


def _read_networks(
    model: nn.Module, path: str, module: nn.Module, layouts: Iterable[FfnLayout]
) -> Iterator[Structure | Skipped]:
    """The structures of the feed-forward networks in a module, one for each second layer."""
    taken: set[str] = set()
    for layout in layouts:
        if layout.second not in taken and matches_ffn(module, layout):
            taken.add(layout.second)
            yield _read(model, path, "ffn", partial(read_ffn, module, layout))


def _read(model: nn.Module, path: str, kind: Kind, read: Callable[[], Structure]) -> Structure | Skipped:
    """What a reader makes of a module, or why it is left alone."""
    hook = None
    try:
        found = read().rename(partial(join, path))
        hook = find_hook(model, path, found)
        reason = hook or find_strange(model, path, found)
    except UnaccountedError as error:
        reason = str(error)
    return found if reason is None else Skipped(path, kind, reason, is_hooked=hook is not None)


def _matches_inside(module: nn.Module, layout: MhaLayout) -> bool:
    """Whether the module that makes query, key and value is a whole attention module itself."""
    owner = find_child(module, owner_of(layout))
    return (
        owner is not module and owner is not None and any(matches_mha(owner, other) for other in layouts_of(MhaLayout))
    )


def _first_module(structure: Structure, modules: Container[str]) -> str:
    """The module that holds its first output tensor."""
    name = structure.outputs[0].tensor
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def _refuse(
    model: nn.Module, found: Discovery, find_reason: Callable[[nn.Module, Structure], str | None]
) -> Discovery:
    """Leave out the structures for which there is a reason."""
    reasons = ((structure, find_reason(model, structure)) for structure in found.structures)
    left = (s if reason is None else Skipped(s.name, s.kind, reason) for s, reason in reasons)
    return Discovery.of((*found.skipped, *left))


def _find_shared(names: _Names, model: nn.Module, structure: Structure) -> str | None:
    """The reason, if another module uses one of its parameters as well.

    A module that holds the whole structure may have several names: then all of it has.
    """
    around = os.path.commonprefix([f"{member.tensor.rpartition('.')[0]}." for member in structure.members])
    path = around.rpartition(".")[0]
    others = names.modules[id(get_module(model, path))]
    for member in structure.members:
        tensor = get_tensor(model, member.tensor)
        inside = member.tensor[len(path) + 1 :] if path else member.tensor
        if names.tensors.get(id(tensor), set()) - {join(other, inside) for other in others}:
            return f"{member.tensor} is used by more than one module, so that it cannot get a size of its own"
    return None


class _Names(NamedTuple):
    """All dotted names of parameters and modules, by id."""

    tensors: dict[int, set[str]]
    modules: dict[int, set[str]]


def _find_names(model: nn.Module) -> _Names:
    names = _Names({}, {})
    for path, module in model.named_modules(remove_duplicate=False):
        names.modules.setdefault(id(module), set()).add(path)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.tensors.setdefault(id(parameter), set()).add(join(path, name))
    return names


def _find_read_above(model: nn.Module, structure: Structure) -> str | None:
    """The reason, if the code of a module around attention reads its number of heads, for a mask perhaps."""
    counted = {count.module for count in structure.counts}
    path = structure.outputs[0].tensor if structure.kind == "mha" else ""
    while path:
        path = path.rpartition(".")[0]
        module = find_child(model, path)
        if module is None or path in counted:
            continue
        for name, value in _head_counts_read(module).items():
            if type(value) is int and value % structure.units == 0:
                return f"{type(module).__name__} around it reads {name} = {value} too"
    return None


def _head_counts_read(module: nn.Module) -> dict[str, Any]:
    """The numbers of heads that a module's code reads; of a model only those in its config.

    A model's own attribute may serve only what its config switches off, such as ALiBi.
    """
    kind: Any = type(module)
    if find_mentioned(kind).isdisjoint(_HEAD_COUNTS):
        return {}
    reads = find_reads(kind)
    if isinstance(module, PreTrainedModel):
        return {f"config.{name}": get_field(module.config, name) for name in reads.config & set(CONFIG_HEADS)}
    return {name: module.__dict__.get(name) for name in (reads.names or frozenset()) & set(QUERY_HEAD_COUNTS)}


def _is_layer(module: nn.Module, name: str) -> bool:
    """Whether a child is a layer, or would be one without what computes its weight."""
    child = find_child(module, name)
    return find_layer(module, name) is not None or (child is not None and is_parametrized(child))


def _find_unknown(model: nn.Module, known: Discovery) -> Iterator[Skipped]:
    """The modules that are called attention or feed-forward networks and match no layout."""
    covered = {kind: {skip.name for skip in known.skipped if skip.kind == kind} for kind in _KINDS}
    for structure in known.structures:
        covered[structure.kind] |= {member.tensor.rpartition(".")[0] for member in structure.members}
    around = {
        kind: {".".join(name.split(".")[:end]) for name in names for end in range(name.count(".") + 2)}
        for kind, names in covered.items()
    }
    inside: list[str] = []
    for path, module in model.named_modules():
        called = _CALLED.search(type(module).__name__)
        if called is None or path.startswith(tuple(inside)):
            continue
        kind: Kind = "mha" if called.group().startswith("Att") else "ffn"
        if path in around[kind] or any(path.startswith(f"{name}.") for name in covered[kind] if name):
            continue
        layers = _layers_in(path, module, covered["ffn"] | covered["mha"])
        if len(layers) > 1:
            inside.append(f"{path}.")
            reason = f"{type(module).__name__} has no known layout; its layers are {', '.join(layers[:8])}"
            yield Skipped(path, kind, reason)


def _layers_in(path: str, module: nn.Module, covered: Container[str]) -> list[str]:
    """The names of the layers in a module that are not covered, and of its own matrices."""
    names = [name for name, _ in module.named_modules() if name and join(path, name) not in covered]
    matrices = [name for name, weight in module._parameters.items() if weight is not None and weight.dim() > 1]
    return [name for name in names if _is_layer(module, name)] + matrices
