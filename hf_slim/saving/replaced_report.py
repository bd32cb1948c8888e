"""What a push of a trainer does away with on the Hub: report and picture of the slim model whose place it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .model_card import PICTURE
from .saved_report import REPORT

_REPLACED = (REPORT, PICTURE)
_IS_REPLACING = ContextVar("hf_slim_is_replacing", default=False)


@contextmanager
def replacing_report() -> Iterator[None]:
    """Let folders that are uploaded in the block take the place of a slim model, whose report is not theirs.

    Yields:
        Nothing.
    """
    token = _IS_REPLACING.set(True)
    try:
        yield
    finally:
        _IS_REPLACING.reset(token)


def upload_replacing(upload: Callable[..., Any], api: Any, /, **keywords: Any) -> Any:
    """Upload a folder; in such a block without the report and the picture of a slim model, and delete those there.

    Args:
        upload: `HfApi.upload_folder`.
        api: What it is a method of.
        **keywords: Its keywords.

    Returns:
        What it returns.
    """
    if _IS_REPLACING.get() and keywords.get("path_in_repo") is None:
        for name in ("ignore_patterns", "delete_patterns"):
            there = keywords.get(name) or []
            keywords[name] = [*([there] if isinstance(there, str) else there), *_REPLACED]
    return upload(api, **keywords)
