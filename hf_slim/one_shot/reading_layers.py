"""The layers that read a structure's units, and what they read: a mode that sees every product with their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..structures import Member, Structure, get_module, get_tensor

_PRODUCTS: Mapping[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.addmm: (1, 2),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), (0, 1)),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm), (0, 1)),
    **dict.fromkeys((F.conv1d, F.conv2d), (0, 1)),
}
"""Which arguments are the input and the weight of a product."""
_CONVOLUTIONS = (F.conv1d, F.conv2d)
_GATHERS = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select)


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer that reads units: FFN2 or an output projection, or one expert's part of stacked ones.

    Args:
        member: The member of the structure, of the role `output`.
        expert: Its number in a stack; None where there is no stack.
        bias: Dotted name of its bias; None where it has none.
    """

    member: Member
    expert: int | None
    bias: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.member.tensor if self.expert is None else f"{self.member.tensor}[{self.expert}]"

    def view_weight(self, model: nn.Module) -> torch.Tensor:
        """Its weight, shape `[outputs, inputs]`, sharing the memory of the model's."""
        weight = get_tensor(model, self.member.tensor).detach()
        dim = self.member.dim
        if self.expert is not None:
            weight, dim = weight[self.expert], dim - 1
        while weight.dim() > 2:  # a convolution of width 1
            weight = weight[..., 0]
        return weight if dim == 1 else weight.t()

    def view_bias(self, model: nn.Module) -> torch.Tensor | None:
        """Its bias, shape `[outputs]`, sharing the memory of the model's; None where it has none."""
        if self.bias is None:
            return None
        bias = get_tensor(model, self.bias).detach()
        return bias if self.expert is None else bias[self.expert]


def find_readers(model: nn.Module, structure: Structure) -> list[Reader]:
    """Find the layers that read the units of a structure.

    Args:
        model: The model that the structure was found in.
        structure: The structure.

    Returns:
        A reader for each member of the role `output`, and for each expert of stacked ones.

    Raises:
        ValueError: If one is a convolution over several positions, or one in groups.
    """
    readers = []
    for member in structure.outputs:
        path, _, leaf = member.tensor.rpartition(".")
        owner, weight = get_module(model, path), get_tensor(model, member.tensor)
        is_convolution = isinstance(getattr(owner, "kernel_size", None), tuple)
        if is_convolution and (getattr(owner, "groups", 1) > 1 or weight[0, 0].numel() > 1):
            raise ValueError(
                f"{member.tensor} is a convolution over several positions or in groups, of which method='obs' and "
                "method='flap' know no inputs: use method='taylor' or 'magnitude', or leave it out with slim_exclude."
            )
        stacked = weight.dim() == 3 and not is_convolution
        bias = f"{leaf}_bias" if stacked else "bias"
        name = f"{path}.{bias}" if path else bias
        known = name if getattr(owner, bias, None) is not None else None
        readers += [Reader(member, number, known) for number in (range(len(weight)) if stacked else (None,))]
    return readers


class Gathered(NamedTuple):
    """Rows that were taken out of a matrix, as the tokens are that a router sends to an expert.

    Args:
        rows: Which rows, int64 of shape `[rows]`.
        size: How many rows the matrix has.
    """

    rows: torch.Tensor
    size: int


Note = Callable[[Reader, torch.Tensor, Gathered | None], None]
"""Called before a layer computes, with the layer, its input, `[..., inputs]`, and which rows that was taken out of."""


class Watch(TorchFunctionMode):
    """Sees what layers read while a model runs in the thread that entered it.

    Args:
        model: The model; its tensors have to stay where they are.
        readers: The layers.
        note: Called before a layer computes. If as many rows as it reads were the last to be taken out of a matrix,
            it is told which: experts read the rows that were taken out for them.
    """

    def __init__(self, model: nn.Module, readers: Iterable[Reader], note: Note) -> None:
        """See the class."""
        super().__init__()
        self._note = note
        self._gathered: Gathered | None = None
        self._weights: dict[str, tuple[torch.Tensor, list[Reader]]] = {}
        for reader in readers:
            weight = get_tensor(model, reader.member.tensor)
            self._weights.setdefault(reader.member.tensor, (weight, []))[1].append(reader)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at products with the weights."""
        kwargs = kwargs or {}
        where = _PRODUCTS.get(func)
        if where is not None:
            values = kwargs.get("input", args[where[0]] if len(args) > where[0] else None)
            weight = kwargs.get("weight", args[where[1]] if len(args) > where[1] else None)
            if isinstance(values, torch.Tensor) and isinstance(weight, torch.Tensor):
                self._look(values.movedim(1, -1) if func in _CONVOLUTIONS else values, weight)
        elif func in _GATHERS:
            self._gathered = _find_gathered(args[0], *args[1:], *kwargs.values()) or self._gathered
        return func(*args, **kwargs)

    def _look(self, values: torch.Tensor, weight: torch.Tensor) -> None:
        begin = weight.data_ptr()
        for own, readers in self._weights.values():
            offset = begin - own.data_ptr()
            if not 0 <= offset < own.numel() * own.element_size() or values.device != own.device:
                continue
            if readers[0].expert is None:
                self._note(readers[0], values, self._match(values))
            elif weight.dim() == 2:
                self._note(readers[offset // (own.stride(0) * own.element_size())], values, self._match(values))
            else:
                for reader, part in zip(readers, values, strict=True):
                    self._note(reader, part, None)
            return

    def _match(self, values: torch.Tensor) -> Gathered | None:
        known = self._gathered
        return known if known is not None and values.dim() == 2 and len(values) == len(known.rows) else None


def _find_gathered(source: torch.Tensor, *index: Any) -> Gathered | None:
    """Which rows of a matrix are taken: `matrix[rows]`, `matrix[None, rows]` or `index_select(0, rows)`."""
    given = index[0] if isinstance(index[0], tuple) else index[1:] if type(index[0]) is int else index
    parts = [part for part in given if part is not None]
    rows = parts[0] if len(parts) == 1 else None
    if not isinstance(rows, torch.Tensor) or source.dim() != 2 or rows.dim() != 1 or rows.dtype != torch.int64:
        return None
    return Gathered(rows, len(source))
