"""A folder that was saved before: its card written again, and its upload."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from .card_facts import is_number
from .hub_upload import check_keywords, push_folder
from .model_card import CARD, rename_in_card, write_model_card
from .saved_report import REPORT, read_report, write_report


def push_slimmed(folder: str | os.PathLike[str], repo_id: str, **hub_kwargs: Any) -> str:
    """Upload a slim model that was saved before, as `save_slimmed(push_to_hub=True)` does.

    Only the files that the save wrote are uploaded, in one commit, which deletes what they replace. What has arrived
    in an earlier attempt is not sent again.

    Args:
        folder: A folder that `save_slimmed` wrote.
        repo_id: The repository; made if it is not there.
        **hub_kwargs: As for `save_slimmed`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        TypeError: If a keyword is unknown.
        ValueError: If the folder holds no slim model, or lacks one of its files, or `repo_id` is no name of a
            repository.
        RuntimeError: If the upload fails; the folder is as it was.
    """
    path = Path(folder).resolve()
    saved = read_report(path)
    check_keywords(hub_kwargs)
    validate_repo_id(repo_id)
    if missing := [str(file) for file in saved.files if not (path / file).is_file()]:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which was saved there: save the model again.")
    before = {name: (path / name).read_bytes() for name in (CARD, REPORT)}
    rename_in_card(path / CARD, saved.name, repo_id)
    write_report(path, saved._replace(name=repo_id))
    try:
        return push_folder(path, saved.files, repo_id, hub_kwargs)
    except BaseException:
        for name, content in before.items():  # a name that the model does not have on the Hub
            (path / name).write_bytes(content)
        raise


def renew_card(
    folder: str | os.PathLike[str],
    *,
    metrics: Mapping[str, float] | None = None,
    metrics_before: Mapping[str, float] | None = None,
) -> Path:
    """Write the card of a saved slim model again, with metrics that were found since.

    What others wrote stays: a card that ours is a section of, and fields of the metadata.

    Args:
        folder: A folder that `save_slimmed` wrote.
        metrics: Evaluation results of the slim model, by name; those that it has if not given.
        metrics_before: Evaluation results of the dense model by the same names, which then stand beside them.

    Returns:
        The card.

    Raises:
        ValueError: If the folder holds no slim model, or a result is no number; nothing is written.
    """
    for name, value in [*(metrics or {}).items(), *(metrics_before or {}).items()]:
        if not is_number(value):
            raise ValueError(f"metrics: {name} must be a number, got {value!r}.")
    path = Path(folder).resolve()
    saved = read_report(path)
    facts = saved.facts
    if metrics is not None:
        facts = replace(facts, provenance=replace(facts.provenance, metrics=_to_floats(metrics)))
    if metrics_before is not None:
        facts = replace(facts, metrics_before=_to_floats(metrics_before))
    saved = saved._replace(facts=facts)
    write_report(path, saved)
    return write_model_card(facts, saved.report, path, saved.name)


def _to_floats(metrics: Mapping[str, float]) -> dict[str, float]:
    """Numbers of whatever library as plain ones, which JSON can hold."""
    return {name: float(value) for name, value in metrics.items()}
