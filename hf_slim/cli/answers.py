"""What a subcommand prints: a text for people, or one JSON object for programs."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from ..parallel import is_first_process


class Answer(NamedTuple):
    """What a subcommand found.

    Args:
        text: The text for people.
        content: What the object for programs holds.
    """

    text: str
    content: Mapping[str, Any]


def answer(work: Callable[[], Any], as_json: bool) -> int:
    """Do the work of a subcommand and print what it gives, in the first process.

    Args:
        work: Returns an `Answer`, or anything that prints and is a dataclass or has `to_dict`.
        as_json: Whether to print one JSON object and nothing else on stdout; what is printed before goes to stderr.

    Returns:
        The exit status, 0.
    """
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = work()
    if is_first_process():
        text = found.text if isinstance(found, Answer) else str(found)
        print(json.dumps(to_json(found), indent=2) if as_json else f"\n{text}")
    return 0


def let_stderr_go() -> None:
    """Print what the command holds back on stderr, and from now on all at once: what follows is no mistake."""
    release = getattr(sys.stderr, "release", None)  # of the command's door, which is installed a second time by itself
    if release is not None:
        release()


def to_json(found: Any) -> Any:
    """Make what a subcommand found strict JSON.

    Args:
        found: As for `answer`, or a part of it.

    Returns:
        Dictionaries, lists and plain values; numbers that are not finite are None.
    """
    if isinstance(found, Answer):
        return to_json(found.content)
    if hasattr(found, "to_dict"):
        return to_json(found.to_dict())
    if is_dataclass(found) and not isinstance(found, type):
        return to_json(asdict(found))
    if isinstance(found, Mapping):
        return {str(key): to_json(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [to_json(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
