"""Structures that span several blocks, since their heads share an attention bias or a table beside the blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from .linear_layers import find_tensor, join, layer_of
from .projection_names import HEAD_TENSORS, QUERY_HEAD_COUNTS, SHARED_TABLES
from .source_code import find_reads
from .structure import Count, Discovery, Explained, Member, Skipped, Structure, blocks, get_module

_ROOTS = {name: name.partition(".")[0] for name in SHARED_TABLES}


def join_blocks(found: Discovery) -> Discovery:
    """Join the attention of blocks that share one attention bias: structures of the same name, with `*` in it.

    Args:
        found: What the modules of a model are made of.

    Returns:
        The same, each such group as one structure, or skipped if its blocks have different numbers of heads.
    """
    groups: dict[str, list[Structure]] = {}
    for structure in found.structures:
        if "*" in structure.name:
            groups.setdefault(structure.name, []).append(structure)
    reason = "blocks that share one attention bias differ in their numbers of heads"
    joined = (
        _join(name, parts) if len({part.units for part in parts}) == 1 else Skipped(name, "mha", reason)
        for name, parts in groups.items()
    )
    return Discovery.of((*found.skipped, *(s for s in found.structures if "*" not in s.name), *joined))


def join_by_tables(model: nn.Module, found: Discovery) -> Discovery:
    """Join the attention of blocks whose heads share a table that lies beside the blocks.

    Attention that is given a bias for each head, but has no such table, is skipped.

    Args:
        model: The model.
        found: What has been found in it.

    Returns:
        The same, with the structures that share a table joined.
    """
    tables = _find_tables(model, {member.tensor for s in found.structures for member in s.members})
    rest: list[Structure | Skipped] = []
    groups: dict[str, list[Structure]] = {path: [] for path in tables}
    for structure in found.structures:
        above = [path for path in tables if structure.kind == "mha" and _is_inside(structure.name, path)]
        if above:
            groups[max(above, key=len)].append(structure)
        elif structure.kind == "mha" and "*" not in structure.name and _needs_bias(model, structure):
            reason = "its forward is given position_bias, which no known layout makes: it may be a bias for each head"
            rest.append(Skipped(structure.name.rpartition(".")[0], "mha", reason))
        else:
            rest.append(structure)
    rest += [_join_by_table(model, parts, tables[path]) for path, parts in groups.items() if parts]
    return Discovery.of((*found.skipped, *rest))


def name_in_stack(model: nn.Module, name: str) -> str:
    """The name with the block's number in the nearest stack (a `PreTrainedModel`) replaced by `*`.

    Args:
        model: The model.
        name: Name of a module in it.

    Returns:
        The name of all modules like it in the stack.
    """
    parts = name.split(".")
    stack = max(
        (end for end in range(len(parts)) if isinstance(get_module(model, ".".join(parts[:end])), PreTrainedModel)),
        default=0,
    )
    block = next((i for i in range(stack, len(parts)) if parts[i].isdigit()), None)
    return name if block is None else ".".join([*parts[:block], "*", *parts[block + 1 :]])


def _join(name: str, parts: Sequence[Structure], table: Explained | None = None) -> Structure:
    """One structure of several with the same number of units, and of a table that they share."""
    members = [member for part in (*parts, table) if part is not None for member in part.members]
    counts = [count for part in (*parts, table) if part is not None for count in part.counts]
    reshaping = [path for part in parts for path in part.reshaping]
    return Structure(name, "mha", parts[0].units, tuple(members), tuple(counts), tuple(reshaping))


def _join_by_table(model: nn.Module, parts: Sequence[Structure], table: Explained) -> Structure | Skipped:
    name = parts[0].name
    name = name if "*" in name or len(parts) < 2 else name_in_stack(model, name)
    if {len(member.index) for member in table.members} == {part.units for part in parts}:
        return _join(name, parts, table)
    return Skipped(name, "mha", f"the table {table.members[0].tensor} has not one position for each of its heads")


def _find_tables(model: nn.Module, owned: set[str]) -> dict[str, Explained]:
    """The shared tables that belong to no attention module, and the attributes beside them that count heads."""
    found = {}
    for path, module in model.named_modules():
        children = {*module._modules, *module._parameters}
        tensors = {name: find_tensor(module, name) for name, root in _ROOTS.items() if root in children}
        sizes = {
            join(path, name): (SHARED_TABLES[name], tensor.shape[SHARED_TABLES[name]])
            for name, tensor in tensors.items()
            if tensor is not None and join(path, name) not in owned
        }
        if sizes:
            members = [Member(name, dim, blocks(heads, 1), "extra") for name, (dim, heads) in sizes.items()]
            counts = [
                Count(owner, key, 1)
                for name, (_, heads) in sizes.items()
                for owner in dict.fromkeys((path, name.rpartition(".")[0]))
                for key in QUERY_HEAD_COUNTS
                if get_module(model, owner).__dict__.get(key) == heads
            ]
            found[path] = Explained(tuple(sizes), members, counts)
    return found


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _needs_bias(model: nn.Module, structure: Structure) -> bool:
    """Whether the module that makes query, key and value is given a bias for each head."""
    made = next(member for member in structure.members if member.role == "input").tensor
    owner = get_module(model, layer_of(made).rpartition(".")[0])
    if "position_bias" not in find_reads(type(owner)).arguments:
        return False
    return not any(m.role == "extra" and m.tensor.endswith(tuple(HEAD_TENSORS)) for m in structure.members)
