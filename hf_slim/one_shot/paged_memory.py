"""Tensors in temporary files, which take no memory while nobody reads them."""

from __future__ import annotations

import mmap
from tempfile import TemporaryFile
from weakref import WeakSet

import psutil
import torch

_FILE = 1 << 28
"""Bytes of a file; so many tensors share it. It takes room on disk as far as it is written."""
_LEAST = 1 << 20
"""Bytes below which a tensor stays in memory: it would not be worth the pages."""


class PagedMemory:
    """Holds copies of tensors in files that are mapped into memory.

    Each is read and written as any tensor; its pages come back from its file when they are touched. A file goes when
    the last tensor in it does.
    """

    def __init__(self) -> None:
        """See the class."""
        self._held: WeakSet[mmap.mmap] = WeakSet()
        self._pages: mmap.mmap | None = None
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor.

        Args:
            tensor: The tensor.

        Returns:
            The copy; the tensor itself where that is small, not contiguous, of a subclass or not on the CPU.
        """
        size = tensor.nbytes
        if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor
        if size < _LEAST:
            return tensor
        if self._pages is None or self._used + size > len(self._pages):
            self._begin_file(max(size, _FILE))
        assert self._pages is not None
        self._file.seek(self._used)
        self._file.write(tensor.detach().flatten().view(torch.uint8).numpy().data)
        self._file.flush()  # an error here if the disk is full, where a write to pages would end the process
        flat = torch.frombuffer(self._pages, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        return flat.view(tensor.shape)

    def page_out(self) -> None:
        """Give back the memory of all that is held, and what the allocators of threads keep for the next time.

        Where the system does so by itself only (Windows), or the C library does not trim, that is left to them.
        """
        if not self._held:
            return
        if hasattr(mmap, "MADV_DONTNEED"):
            for pages in self._held:
                pages.madvise(mmap.MADV_DONTNEED)
        if hasattr(psutil, "heap_trim"):
            psutil.heap_trim()

    def _begin_file(self, size: int) -> None:
        self._file = TemporaryFile(prefix="hf_slim-")
        self._file.truncate(size)
        self._pages, self._used = mmap.mmap(self._file.fileno(), 0), 0
        self._held.add(self._pages)
