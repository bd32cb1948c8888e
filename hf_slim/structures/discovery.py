"""From a model to the structures that can be slimmed, and to the modules that cannot, with the reason."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from .attention import matches_mha, owner_of, read_mha
from .custom_code import find_strange
from .feed_forward import matches_ffn, read_ffn
from .linear_layers import find_child, find_layer, join
from .peft_adapters import find_obstacle
from .projection_layouts import CONFIG_HEADS, FFN_LAYOUTS, MHA_LAYOUTS, QUERY_HEAD_COUNTS, MhaLayout
from .shared_tables import join_blocks, join_by_tables, name_in_stack
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
    structures: list[Structure] = []
    skipped: list[Skipped] = []
    joint: dict[str, list[Structure]] = {}
    # With each layout the names of which a module has to have one to match it.
    mha_layouts = [(layout, {name.partition(".")[0] for name in layout.outputs}) for layout in MHA_LAYOUTS]
    ffn_layouts = [(layout, {layout.second.partition(".")[0]}) for layout in FFN_LAYOUTS]
    known = frozenset(root for _, roots in (*mha_layouts, *ffn_layouts) for root in roots)
    for path, module in model.named_modules():
        children = known.intersection((*module._modules, *module._parameters))
        if not children:
            continue
        for mha, roots in mha_layouts:
            if not roots.isdisjoint(children) and matches_mha(module, mha) and not _matches_inside(module, mha):
                try:
                    found = _refuse_strange(model, path, read_mha(path, module, mha))
                except UnaccountedError as reason:
                    skipped.append(Skipped(path, "mha", str(reason)))
                    break
                if mha.joint is not None and hasattr(module, mha.joint):
                    joint.setdefault(name_in_stack(model, found.name), []).append(found)
                else:
                    structures.append(found)
                break
        taken: set[str] = set()
        for ffn, roots in ffn_layouts:
            if not roots.isdisjoint(children) and ffn.second not in taken and matches_ffn(module, ffn):
                taken.add(ffn.second)
                try:
                    structures.append(_refuse_strange(model, path, read_ffn(path, module, ffn)))
                except UnaccountedError as reason:
                    skipped.append(Skipped(path, "ffn", str(reason)))
    structures += join_blocks(joint, skipped)
    structures = join_by_tables(model, structures, skipped)
    for find_reason in (find_obstacle, partial(_find_shared, _find_names(model)), _find_read_above):
        structures = _refuse(model, structures, skipped, find_reason)
    skipped += _find_unknown(model, structures, skipped)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    structures.sort(key=lambda s: order[_first_module(s, order)])
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


def _refuse_strange(model: nn.Module, path: str, structure: Structure) -> Structure:
    reason = find_strange(model, path, structure)
    if reason is not None:
        raise UnaccountedError(reason)
    return structure


def _matches_inside(module: nn.Module, layout: MhaLayout) -> bool:
    """Whether the module that makes query, key and value is a whole attention module itself."""
    owner = find_child(module, owner_of(layout))
    return owner is not module and owner is not None and any(matches_mha(owner, other) for other in MHA_LAYOUTS)


def _first_module(structure: Structure, modules: Container[str]) -> str:
    """The module that holds its first output tensor."""
    name = structure.outputs[0].tensor
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def _refuse(
    model: nn.Module,
    structures: list[Structure],
    skipped: list[Skipped],
    find_reason: Callable[[nn.Module, Structure], str | None],
) -> list[Structure]:
    """Leave out the structures for which there is a reason."""
    reasons = [(structure, find_reason(model, structure)) for structure in structures]
    skipped += [Skipped(s.name, s.kind, reason) for s, reason in reasons if reason is not None]
    return [structure for structure, reason in reasons if reason is None]


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


def _find_unknown(model: nn.Module, structures: list[Structure], skipped: list[Skipped]) -> list[Skipped]:
    """The modules that are called attention or feed-forward networks and match no layout."""
    covered = {kind: {skip.name for skip in skipped if skip.kind == kind} for kind in _KINDS}
    for structure in structures:
        covered[structure.kind] |= {member.tensor.rpartition(".")[0] for member in structure.members}
    members = {name for names in covered.values() for name in names}
    around = {
        kind: {".".join(name.split(".")[:end]) for name in names for end in range(name.count(".") + 2)}
        for kind, names in covered.items()
    }
    found: list[Skipped] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        called = _CALLED.search(type(module).__name__)
        if called is None or path.startswith(tuple(inside)):
            continue
        kind: Kind = "mha" if called.group().startswith("Att") else "ffn"
        if path in around[kind]:
            continue
        layers = [
            name
            for name, _ in module.named_modules()
            if name and join(path, name) not in members and _is_layer(module, name)
        ]
        layers += [name for name, weight in module._parameters.items() if weight is not None and weight.dim() > 1]
        if len(layers) < 2 or any(path.startswith(f"{name}.") for name in covered[kind] if name):
            continue
        inside.append(f"{path}.")
        children = ", ".join(dict.fromkeys(name for name in layers[:8]))
        found.append(Skipped(path, kind, f"{type(module).__name__} has no known layout; its layers are {children}"))
    return found
