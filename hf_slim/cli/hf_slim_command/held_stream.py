"""stderr held back: what libraries print on the way to a mistake would bury the one line that names it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import TextIO


class HeldStream(io.TextIOBase):
    """A stream that keeps what is written until it is known whether anybody wants it.

    Progress bars are let through where a person watches them.

    Args:
        stream: Where it goes in the end.
    """

    def __init__(self, stream: TextIO) -> None:
        """See the class."""
        super().__init__()
        self._stream = stream
        self._held: list[str] | None = []
        self._is_in_line = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Keep a text, or let it through."""
        if self._held is None:
            return self._stream.write(text)
        if "\r" in text and self.isatty():
            self._is_in_line = True
            return self._stream.write(text)
        self._held.append(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person watches."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The stream's, for those who write past it."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True

    def release(self) -> None:
        """Print what was kept, and from now on all at once."""
        held, self._held = self._held, None
        for text in held or ():
            self._stream.write(text)

    def drop(self) -> None:
        """Forget what was kept, and from now on print all at once."""
        if self._held is not None and self._is_in_line:
            self._stream.write("\n")
        self._held = None


@contextlib.contextmanager
def holding_stderr() -> Iterator[HeldStream]:
    """Hold back stderr, and the loggers that write to it by now.

    Yields:
        What holds it.
    """
    stream = sys.stderr
    held = HeldStream(stream)
    loggers = (logging.root, *logging.root.manager.loggerDict.values())
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    bound = [h for h in handlers if isinstance(h, logging.StreamHandler) and vars(h).get("stream") is stream]
    for handler in bound:
        handler.setStream(held)
    try:
        with contextlib.redirect_stderr(held):
            yield held
    finally:
        for handler in bound:
            handler.setStream(stream)
