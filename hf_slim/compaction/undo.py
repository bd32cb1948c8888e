"""What is taken from a model by compaction, kept until it is known to have been right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..parallel import change_tensor, read_tensor, take_positions
from ..proof import Snapshot
from ..structures import Masks, Structure, get_tensor
from .cut_tensors import compact_model, find_kept
from .optimizer_state import find_state_slices

_MERGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of tensors that are put together again; of others the whole tensor is kept."""

Cut = dict[int, torch.Tensor]
"""For the dimensions of a tensor boolean tensors on the CPU, True for the positions that stay."""


class _Piece(NamedTuple):
    """What a tensor loses along one dimension, after it has been cut along those before."""

    dim: int
    keep: torch.Tensor
    values: torch.Tensor


class Undo:
    """Makes a model what it was before units were zeroed or removed: weights, attributes, classes and configs.

    Args:
        model: The model, as it is to be after `put_back`.
        optimizer: The optimizer, whose state is cut as well; None for none.
        shared: Whether another model holds the same tensors, so that it takes no memory to keep them whole.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, *, shared: bool = False) -> None:
        """See the class."""
        self._model = model
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._shared = shared
        self._snapshot = Snapshot(model)
        self._steps: list[Callable[[], None]] = []

    def keep(self, structures: Sequence[Structure], masks: Masks) -> None:
        """Copy what masks drop, and what the optimizer keeps for it, before any of it is zeroed or cut.

        Args:
            structures: The structures that are going to lose units.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        """
        kept = find_kept(self._model, structures, masks)
        slices, _ = find_state_slices(self._optimizer, self._model, kept)
        states: dict[tuple[str, str], Cut] = {}
        for (name, dim), keep in kept.items():
            for key, where in slices[name, dim]:
                states.setdefault((name, key), {})[where] = keep
        for name, cut in _by_tensor(kept).items():
            pieces = _take_pieces(get_tensor(self._model, name), cut)
            self._steps.append(partial(change_tensor, self._model, name, partial(_join, pieces=pieces)))
        for (name, key), cut in states.items():
            state = self._optimizer.state[get_tensor(self._model, name)]
            self._steps.append(partial(_join_state, state, key, _take_pieces(state[key], cut)))

    def cut(self, structures: Sequence[Structure], masks: Masks) -> list[Structure]:
        """Remove the units that masks drop, which are zero.

        It goes on from one structure to the next, so that nothing is there twice: what is kept is no larger than what
        has become free.

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
            for name, cut in _by_tensor(find_kept(self._model, group, masks)).items():
                self._keep_tensor(name, cut, whole=name in scaled)
            left += compact_model(self._model, group, masks)
        return left

    @torch.no_grad()
    def put_back(self) -> None:
        """Make all what it was, whether it has been cut or not."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()
        self._snapshot.put_back()

    def _keep_tensor(self, name: str, cut: Cut, *, whole: bool) -> None:
        """Keep a tensor with its gradient: what is cut from it, or all of it where that takes no memory."""
        tensor = get_tensor(self._model, name)
        values = read_tensor(self._model, name).detach()
        pieces = [] if whole or self._shared or not _is_alone(values) else _take_pieces(values, cut)
        self._steps.append(partial(_restore, self._model, name, tensor.grad, pieces or values))


def _restore(
    model: nn.Module, name: str, gradient: torch.Tensor | None, kept: torch.Tensor | Sequence[_Piece]
) -> None:
    change_tensor(model, name, (lambda _: kept) if isinstance(kept, torch.Tensor) else partial(_join, pieces=kept))
    if gradient is not None:
        get_tensor(model, name).grad = gradient


def _join_state(state: dict[str, Any], key: str, pieces: Sequence[_Piece]) -> None:
    state[key] = _join(state[key], pieces)


def _is_alone(values: torch.Tensor) -> bool:
    """Whether nothing else lies in a tensor's memory, so that it may be put together anew."""
    return (
        type(values) in (torch.Tensor, nn.Parameter)
        and values.dtype in _MERGED
        and values.is_contiguous()
        and not (values.device.type == "cpu" and values.is_shared())
        and values.untyped_storage().nbytes() == values.numel() * values.element_size()
    )


def _by_tensor(kept: dict[tuple[str, int], torch.Tensor]) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for (name, dim), keep in kept.items():
        cuts.setdefault(name, {})[dim] = keep
    return cuts


def _take_pieces(tensor: torch.Tensor, cut: Cut) -> list[_Piece]:
    pieces: list[_Piece] = []
    for dim, keep in cut.items():
        values = take_positions(tensor.detach(), dim, ~keep)
        for before in pieces:
            values = take_positions(values, before.dim, before.keep)
        pieces.append(_Piece(dim, keep, values))
    return pieces


def _join(tensor: torch.Tensor, pieces: Sequence[_Piece]) -> torch.Tensor:
    """The whole tensor, from what is left of it or from one with other values where it is going to be cut."""
    for dim, keep, _ in pieces:
        if tensor.shape[dim] == len(keep):
            tensor = take_positions(tensor, dim, keep)
    for dim, keep, values in reversed(pieces):
        whole = tensor.new_empty((*tensor.shape[:dim], len(keep), *tensor.shape[dim + 1 :]))
        for part, mask in ((tensor, keep), (values.to(tensor.device), ~keep)):
            whole.index_copy_(dim, mask.nonzero().flatten().to(whole.device), part)
        tensor = whole
    return tensor


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
