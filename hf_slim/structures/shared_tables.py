"""Structures that span several blocks, since their heads share an attention bias or a table beside the blocks."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .linear_layers import find_tensor, join, layer_of
from .projection_layouts import HEAD_TENSORS, QUERY_HEAD_COUNTS, SHARED_TABLES
from .source_code import find_reads
from .structure import Count, Member, Skipped, Structure, blocks, get_module

_TABLES = {name: name.partition(".")[0] for name in SHARED_TABLES}


def join_blocks(joint: dict[str, list[Structure]], skipped: list[Skipped]) -> list[Structure]:
    """One structure of those in different blocks that share an attention bias.

    Args:
        joint: The structures of the blocks, by the name of their stack.
        skipped: What is left alone; more is appended.

    Returns:
        The joined structures.
    """
    found = []
    for name, parts in joint.items():
        if len({part.units for part in parts}) > 1:
            skipped.append(
                Skipped(name, "mha", "blocks that share one attention bias differ in their numbers of heads")
            )
            continue
        members = tuple(member for part in parts for member in part.members)
        counts = tuple(count for part in parts for count in part.counts)
        reshaping = tuple(name for part in parts for name in part.reshaping)
        found.append(Structure(name, "mha", parts[0].units, members, counts, reshaping))
    return found


def join_by_tables(model: nn.Module, structures: list[Structure], skipped: list[Skipped]) -> list[Structure]:
    """Join the attention of blocks whose heads share a table that lies beside the blocks.

    Attention that is given a bias for each head, but has no such table, is skipped.

    Args:
        model: The model.
        structures: What has been found in it.
        skipped: What is left alone; more is appended.

    Returns:
        The structures, with those that share a table joined.
    """
    tables, counts = _find_tables(model, {member.tensor for s in structures for member in s.members})
    rest: list[Structure] = []
    groups: dict[str, list[Structure]] = {path: [] for path in tables}
    for structure in structures:
        above = [path for path in tables if structure.kind == "mha" and _is_inside(structure.name, path)]
        if above:
            groups[max(above, key=len)].append(structure)
        elif structure.kind == "mha" and "*" not in structure.name and _needs_bias(model, structure):
            skipped.append(
                Skipped(
                    structure.name.rpartition(".")[0],
                    "mha",
                    "its forward is given position_bias, which no known layout makes: it may be a bias for each head",
                )
            )
        else:
            rest.append(structure)
    for path, parts in groups.items():
        name = parts[0].name if parts else path
        name = name if "*" in name or len(parts) < 2 else name_in_stack(model, name)
        if parts and {len(m.index) for m in tables[path]} == {part.units for part in parts}:
            members = (*(m for part in parts for m in part.members), *tables[path])
            joined = (*(c for part in parts for c in part.counts), *counts.get(path, ()))
            reshaping = tuple(name for part in parts for name in part.reshaping)
            rest.append(Structure(name, "mha", parts[0].units, members, joined, reshaping))
        elif parts:
            skipped.append(
                Skipped(name, "mha", f"the table {tables[path][0].tensor} has not one position for each of its heads")
            )
    return rest


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


def _find_tables(model: nn.Module, owned: set[str]) -> tuple[dict[str, list[Member]], dict[str, list[Count]]]:
    """The shared tables that belong to no attention module, and the attributes beside them that count heads."""
    tables: dict[str, list[Member]] = {}
    counts: dict[str, list[Count]] = {}
    for path, module in model.named_modules():
        for name, dim in SHARED_TABLES.items():
            root = _TABLES[name]
            if root not in module._modules and root not in module._parameters:
                continue
            tensor, full = find_tensor(module, name), join(path, name)
            if tensor is None or full in owned:
                continue
            heads = tensor.shape[dim]
            tables.setdefault(path, []).append(Member(full, dim, blocks(heads, 1), "extra"))
            for owner in dict.fromkeys((path, full.rpartition(".")[0])):
                values = get_module(model, owner).__dict__
                known = counts.setdefault(path, [])
                known += [Count(owner, key, 1) for key in QUERY_HEAD_COUNTS if values.get(key) == heads]
    return tables, counts


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _needs_bias(model: nn.Module, structure: Structure) -> bool:
    """Whether the module that makes query, key and value is given a bias for each head."""
    made = next(member for member in structure.members if member.role == "input").tensor
    owner = get_module(model, layer_of(made).rpartition(".")[0])
    if "position_bias" not in find_reads(type(owner)).arguments:
        return False
    return not any(m.role == "extra" and m.tensor.endswith(tuple(HEAD_TENSORS)) for m in structure.members)
