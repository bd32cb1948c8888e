"""What a teacher says of each row of fixed data, kept in memory so that it has to say it once."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map

from .signals import Signals

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_HALF = 5e-2

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class _Row(NamedTuple):
    """What is kept of a row: tensors without trailing padding, and the length of the batch if they depend on it."""

    signals: Signals
    length: int | None


class KeptOutputs:
    """A teacher's outputs by the content of rows, whatever batch they come in and however long it is padded.

    Rows that are not known, since data change from epoch to epoch, are asked for again each time; only those of the
    first epoch are kept.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._rows: dict[bytes, _Row] = {}
        self._is_proven = False
        self.is_full = False

    def __len__(self) -> int:
        """The number of rows that are known."""
        return len(self._rows)

    def find(self, inputs: Inputs, ask: Callable[[Inputs], Signals]) -> Signals:
        """What the teacher says of a batch.

        Args:
            inputs: Positional and keyword arguments of the call; what tensors hold is told by rows.
            ask: Asks the teacher.

        Returns:
            What it says, with zeros at trailing padding where it was kept.

        Raises:
            ValueError: If what the teacher says of a row depends on the other rows, or on padding.
        """
        batch = _Batch(inputs)
        keys = list(batch.make_keys())
        known = [self._rows.get(key) for key in keys]
        rows = [row for row in known if row is not None]
        if len(rows) == len(keys) and all(row.length in (None, batch.length) for row in rows):
            return batch.join(rows)
        signals = ask(inputs)
        if self.is_full:
            self._warn()
            return signals
        if not self._is_proven:
            batch.check_independent(signals, ask)
            self._is_proven = True
        self._rows |= zip(keys, batch.split(signals), strict=True)
        return signals

    def _warn(self) -> None:
        warnings.warn(
            "slim_cache_teacher: a row was not among those of the first epoch, so the data change from epoch to epoch "
            "(augmentation, sampling, packing). The teacher computes such rows each time: leave slim_cache_teacher "
            "off.",
            stacklevel=2,
        )


class _Batch:
    """The rows of a batch."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        leaves, _ = tree_flatten(inputs)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.others = repr([leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)])
        args, kwargs = inputs
        named = {**(args[0] if args and isinstance(args[0], dict) else {}), **kwargs}
        first = next((t for t in named.values() if isinstance(t, torch.Tensor) and t.dim()), None)
        if first is None:
            first = next((t for t in self.tensors if t.dim()), None)
        if first is None or any(t.dim() and len(t) != len(first) for t in self.tensors):
            raise ValueError("slim_cache_teacher: the inputs of the model are not rows: leave slim_cache_teacher off.")
        self.device, self.rows = first.device, len(first)
        mask = named.get("attention_mask")
        self.length: int | None = None
        self.used: list[int | None] = [None] * self.rows
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.length = mask.shape[1]
            places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            self.used = (places * mask.bool()).amax(1).tolist()

    def make_keys(self) -> Iterator[bytes]:
        """A hash of each row without its trailing padding."""
        tensors = [tensor.detach().cpu() for tensor in self.tensors]
        for row, used in enumerate(self.used):
            digest = hashlib.sha256(self.others.encode())
            for tensor in tensors:
                part = self._cut(tensor, row, used)
                digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
                digest.update(part.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            yield digest.digest()

    def split(self, signals: Signals) -> Iterator[_Row]:
        """What is to be kept of each row."""
        # Two dimensions do not tell positions from classes, so that such a tensor is kept whole.
        is_odd = any(tensor.dim() == 2 and tensor.shape[1] == self.length for tensor in signals.values())
        moved = {name: tensor.detach().cpu() for name, tensor in signals.items()}
        for row, used in enumerate(self.used):
            cut = {name: self._cut(t, row, used if t.dim() > 2 else None).clone() for name, t in moved.items()}
            yield _Row(cut, self.length if is_odd else None)

    def join(self, rows: list[_Row]) -> Signals:
        """The tensors of a batch from those of its rows."""
        signals = {}
        for name, first in rows[0].signals.items():
            tensors = [row.signals[name] for row in rows]
            if self.length is not None and first.dim() > 1:  # a row with positions, cut to those that are used
                whole = first.new_zeros(len(rows), self.length, *first.shape[1:])
                for number, tensor in enumerate(tensors):
                    whole[number, : len(tensor)] = tensor
                signals[name] = whole.to(self.device)
            else:
                signals[name] = torch.stack(tensors).to(self.device)
        return signals

    def check_independent(self, signals: Signals, ask: Callable[[Inputs], Signals]) -> None:
        """Ask for one row alone, the one with the most padding, and compare."""
        row = min(range(self.rows), key=lambda number: self.used[number] or 0)
        used = self.used[row]

        def take(value: Any) -> Any:
            return self._cut(value, row, used)[None] if isinstance(value, torch.Tensor) and value.dim() else value

        alone = ask(tree_map(take, self.inputs))
        for name, tensor in signals.items():
            wanted = self._cut(tensor, row, used if tensor.dim() > 2 else None)
            got = alone[name][0] if len(tensor) == self.rows else None
            if got is not None and got.dim() == 1 and got.shape != wanted.shape:
                wanted = wanted[: len(got)]  # one number for each position
            tolerance = _TOLERANCE.get(tensor.dtype, _TOLERANCE_HALF)
            if got is None or got.shape != wanted.shape or not _is_near(got, wanted, tolerance):
                raise ValueError(
                    f"slim_cache_teacher: what the teacher says of a row ({name}) depends on the other rows of the "
                    "batch or on padding, so that it cannot be kept for the row: leave slim_cache_teacher off."
                )

    def _cut(self, tensor: torch.Tensor, row: int, used: int | None) -> torch.Tensor:
        """One row of a tensor, without trailing padding if it has positions."""
        if not tensor.dim():
            return tensor
        has_positions = used is not None and tensor.dim() > 1 and tensor.shape[1] == self.length
        return tensor[row, :used] if has_positions else tensor[row]


def _is_near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    one, other = one.float(), other.float()
    return bool(((one - other).abs() <= tolerance * (1 + other.abs().amax())).all())
