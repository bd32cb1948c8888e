"""Which data sets of the Hub a training used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_SOURCE = re.compile(r"hf://datasets/([^@]+)@")


class DataName(NamedTuple):
    """A data set of the Hub.

    Args:
        repo_id: Its repository.
        config: Which of its configurations, if it has several.
        split: Which part of it, if known.
    """

    repo_id: str
    config: str | None = None
    split: str | None = None


def find_data_name(data: Any) -> DataName | None:
    """Find where data come from.

    Args:
        data: What a trainer trains on, or is evaluated on: a `datasets.Dataset`, or anything else.

    Returns:
        The data set; None if it is not one of the Hub, or its name is not known.
    """
    info = getattr(data, "info", None)
    sources = getattr(info, "download_checksums", None)
    for source in sources if isinstance(sources, dict) else ():
        if match := _SOURCE.match(source):
            config = getattr(info, "config_name", None)
            split = getattr(data, "split", None)
            return DataName(match[1], config if config != "default" else None, None if split is None else str(split))
    return None


def find_data_names(data: Any) -> list[DataName]:
    """Find where all parts of data come from.

    Args:
        data: A data set, or several, by name.

    Returns:
        The data sets that are known, each once.
    """
    found = (find_data_name(part) for part in _parts(data))
    return list(dict.fromkeys(name for name in found if name is not None))


def _parts(data: Any) -> Iterator[Any]:
    parts: Iterable[Any] = data.values() if isinstance(data, dict) else [data]
    yield from parts
