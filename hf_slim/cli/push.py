"""`hf-slim push`: the folder of a slim model uploaded to the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from huggingface_hub.utils import validate_repo_id

from ..saving import check_keywords, push_folder, rename_in_card
from .model_folder import check_slim_folder

_NOT_OF_THE_MODEL = (".", "_", "checkpoint-")
"""What names of files and folders begin with that the Trainer does not upload, either."""


def push(folder: str, repo_id: str, *, private: bool, token: str | None, revision: str | None, create_pr: bool) -> str:
    """Upload the folder of a slim model, in one commit.

    Args:
        folder: The folder.
        repo_id: The repository; made if it is not there.
        private: Make it private, if it is made.
        token: A token with the right to write; that of the login if it is not given.
        revision: A branch; made if it is not there.
        create_pr: Open a pull request in place of pushing.

    Returns:
        What was uploaded where.

    Raises:
        ValueError: If the folder holds no slim model or no card, or an argument does not fit.
        RuntimeError: If the upload fails; the folder is as it was.
    """
    path = check_slim_folder(folder)
    validate_repo_id(repo_id)
    given = {"private": private or None, "token": token, "revision": revision, "create_pr": create_pr or None}
    keywords = {name: value for name, value in given.items() if value is not None}
    check_keywords(keywords)
    card = path / "README.md"
    if not card.is_file():
        raise ValueError(f"{folder} has no model card: write one with `hf-slim card {folder}`.")
    before, files = card.read_bytes(), tuple(_find_files(path))
    rename_in_card(card, path.resolve().name, repo_id)
    try:
        push_folder(path, files, repo_id, keywords)
    except BaseException:
        card.write_bytes(before)
        raise
    return f"Uploaded {len(files)} files of {folder} to {repo_id}{f', branch {revision}' if revision else ''}."


def _find_files(folder: Path) -> Iterator[PurePosixPath]:
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(_NOT_OF_THE_MODEL) for part in place.parts):
            yield PurePosixPath(place)
