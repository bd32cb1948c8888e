"""What a save leaves for those who come after it: the report, what its card says, and which files it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .card_facts import CardFacts
from .report import SlimReport

REPORT = "slim_report.json"
"""The file beside the card."""
_VERSION = 1


class SavedReport(NamedTuple):
    """What a save leaves.

    Args:
        name: What the card calls the model.
        report: What slimming made of the model.
        facts: What the card says beside it.
        files: All files that were written, relative to the folder.
    """

    name: str
    report: SlimReport
    facts: CardFacts
    files: tuple[PurePosixPath, ...]


def write_report(folder: Path, saved: SavedReport) -> None:
    """Write it beside the card.

    Args:
        folder: The folder.
        saved: What is to be read again.
    """
    stored = {
        "version": _VERSION,
        "name": saved.name,
        "report": saved.report.to_dict(),
        "card": saved.facts.to_dict(),
        "files": [str(path) for path in saved.files],
    }
    written = folder / f".{REPORT}.written"
    written.write_text(json.dumps(stored, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    written.replace(folder / REPORT)


def read_report(folder: Path) -> SavedReport:
    """Read it again.

    Args:
        folder: A folder that `save_slimmed` wrote.

    Returns:
        What it left.

    Raises:
        ValueError: If there is no such file, or it is none of ours.
    """
    path = folder / REPORT
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: name the folder of a slim model.")
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {REPORT}, so it was not written by save_slimmed, hf-slim run or hf-slim prune. "
            "Save the model by one of them, or upload the folder as it is with `hf upload`."
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return SavedReport(
            stored["name"],
            SlimReport.from_dict(stored["report"]),
            CardFacts.from_dict(stored["card"]),
            tuple(map(PurePosixPath, stored["files"])),
        )
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}. Save the model again.") from error


def list_files(folder: Path, *more: str) -> Iterable[PurePosixPath]:
    """List the files in a folder, in order.

    Args:
        folder: The folder.
        *more: Files that are to be there, too.

    Returns:
        Their paths, relative to the folder.
    """
    there = {PurePosixPath(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(there | set(map(PurePosixPath, more)))
