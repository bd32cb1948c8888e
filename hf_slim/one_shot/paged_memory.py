"""Tensors in temporary files, which take memory only from when they are read until they are paged out."""

from __future__ import annotations

import mmap
import tempfile
from typing import BinaryIO, cast
from weakref import WeakSet

import torch

_LEAST = 1 << 16
"""Bytes below which a tensor stays in memory: writing it would take longer than it is worth."""
_SHARING, _ROOM = 8, 1 << 28
"""So many tensors at least share a file, and so many bytes: it takes a descriptor while a tensor in it is held."""


class PagedMemory:
    """Holds tensors in files that are mapped into memory.

    Each is read and written as any tensor; its pages come back from its file when they are touched. A file is deleted
    when the last tensor in it goes.
    """

    def __init__(self) -> None:
        """See the class."""
        self._held: WeakSet[mmap.mmap] = WeakSet()
        self._current: tuple[BinaryIO, mmap.mmap] | None = None
        self._used = 0

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor to a file.

        Args:
            tensor: The tensor.

        Returns:
            One with the same values; the tensor itself where it is small, not contiguous, of a subclass, not on the
            CPU, wants a gradient, or has attributes.

        Raises:
            OSError: If there is no room.
        """
        plain = (
            type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not (tensor.requires_grad or vars(tensor))
        )
        if not plain or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous() or tensor.nbytes < _LEAST:
            return tensor
        try:
            pages, offset = self._write(tensor.detach().flatten().view(torch.uint8).numpy().data)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: what forward passes hold while they wait is written to temporary files, and "
                f"{tensor.nbytes / 1e6:.1f} MB more found no room in {tempfile.gettempdir()}. Name a folder with more "
                "room in the variable TMPDIR, or take fewer or shorter samples (num_calibration_samples, "
                "max_seq_length).",
            ) from error
        return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)

    def page_out(self) -> None:
        """Give back the memory of what is held; on Windows the system does so by itself."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages in self._held:
                pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Take no more tensors into the last file; those in it stay."""
        if self._current is not None:
            self._current[0].close()
            self._current = None

    def _write(self, data: memoryview) -> tuple[mmap.mmap, int]:
        """Write bytes to the file, which fails if there is no room; writing to its pages would end the process."""
        if self._current is None or self._used + len(data) > len(self._current[1]):
            file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))
            try:
                file.truncate(max(_SHARING * len(data), _ROOM))
                pages = mmap.mmap(file.fileno(), 0)
            except BaseException:
                file.close()
                raise
            self.close()
            self._current, self._used = (file, pages), 0
            self._held.add(pages)
        file, pages = self._current
        offset = self._used
        file.seek(offset)
        while data:
            data = data[file.write(data) :]
        self._used = -(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE
        return pages, offset
