"""What compaction cuts from a model, kept until it is known to have been right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..parallel import change_tensor, read_tensor, take_positions
from ..proof import Snapshot
from ..structures import Masks, Structure, get_tensor
from .compact import compact_model

_MERGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of tensors that are put together again; of others the whole tensor is kept."""


@dataclass(frozen=True)
class _Cut:
    """A tensor before units were cut from it: the whole of it, or what is cut."""

    name: str
    shape: torch.Size
    gradient: torch.Tensor | None
    values: torch.Tensor
    dim: int | None = None
    keep: torch.Tensor | None = None

    def put_back(self, model: nn.Module) -> None:
        tensor = get_tensor(model, self.name)
        if self.dim is None:
            change_tensor(model, self.name, lambda _: self.values)
        elif tensor.shape != self.shape:
            change_tensor(model, self.name, self._merge)
        if self.gradient is not None:
            tensor.grad = self.gradient

    def _merge(self, left: torch.Tensor) -> torch.Tensor:
        assert self.dim is not None and self.keep is not None
        whole = left.new_empty(self.shape)
        whole.index_copy_(self.dim, self.keep.nonzero().flatten().to(left.device), left)
        whole.index_copy_(self.dim, (~self.keep).nonzero().flatten().to(left.device), self.values.to(left.device))
        return whole


class Cuts:
    """Units that are removed from a model and can be put back.

    Compaction goes on from one structure to the next, so that nothing is there twice: what is kept is no larger than
    what has become free.

    Args:
        model: The model, as it is to be after `put_back`: weights, Parameter objects, gradients, attributes, classes
            and configs.
        shared: Whether another model holds the same tensors, so that it takes no memory to keep them whole.
    """

    def __init__(self, model: nn.Module, *, shared: bool = False) -> None:
        """See the class."""
        self._model = model
        self._shared = shared
        self._snapshot = Snapshot(model)
        self._cuts: list[_Cut] = []

    def make(self, structures: Sequence[Structure], masks: Masks) -> list[Structure]:
        """Remove the units that masks drop.

        Args:
            structures: The structures of the model.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

        Returns:
            The structures as they are now.

        Raises:
            ValueError: If a mask keeps no unit at all.
        """
        left: list[Structure] = []
        for group in _groups(structures):
            scaled = {member.tensor for s in group for member in s.members if member.role == "norm"}
            for name, dims in _find_dropped(group, masks).items():
                self._cuts.append(self._keep(name, dims, whole=name in scaled))
            left += compact_model(self._model, group, masks)
        return left

    def put_back(self) -> None:
        """Make the model what it was."""
        while self._cuts:
            self._cuts[-1].put_back(self._model)
            self._cuts.pop()
        self._snapshot.put_back()

    def _keep(self, name: str, dims: dict[int, torch.Tensor], *, whole: bool) -> _Cut:
        tensor = get_tensor(self._model, name)
        values = read_tensor(self._model, name).detach()
        if whole or self._shared or len(dims) > 1 or not _is_alone(values):
            return _Cut(name, tensor.shape, tensor.grad, values)
        ((dim, where),) = dims.items()
        keep = torch.ones(values.shape[dim], dtype=torch.bool, device="cpu")
        keep[where] = False
        return _Cut(name, tensor.shape, tensor.grad, take_positions(values, dim, ~keep), dim, keep)


def _is_alone(values: torch.Tensor) -> bool:
    """Whether nothing else lies in a tensor's memory, so that it may be put together anew."""
    return (
        type(values) in (torch.Tensor, nn.Parameter)
        and values.dtype in _MERGED
        and values.is_contiguous()
        and not (values.device.type == "cpu" and values.is_shared())
        and values.untyped_storage().nbytes() == values.numel() * values.element_size()
    )


def _find_dropped(structures: Sequence[Structure], masks: Masks) -> dict[str, dict[int, torch.Tensor]]:
    """For each tensor that becomes smaller the positions that go, by dimension."""
    found: dict[str, dict[int, list[torch.Tensor]]] = {}
    for structure in structures:
        for (name, dim), where in structure.positions(~masks[structure.name]).items():
            if len(where):
                found.setdefault(name, {}).setdefault(dim, []).append(where)
    return {name: {dim: torch.cat(parts) for dim, parts in dims.items()} for name, dims in found.items()}


def _groups(structures: Sequence[Structure]) -> Iterator[list[Structure]]:
    """The structures in groups that share no tensor, so that each group can be compacted by itself."""
    groups: dict[str, list[Structure]] = {}
    for structure in structures:
        names = {member.tensor for member in structure.members}
        touched = {id(groups[name]): groups[name] for name in names if name in groups}
        group = [*(other for part in touched.values() for other in part), structure]
        for member in (member for other in group for member in other.members):
            groups[member.tensor] = group
    yield from {id(group): group for group in groups.values()}.values()
