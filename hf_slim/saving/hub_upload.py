"""Uploading what one save wrote to a repository of the Hub, in one commit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .atomic_folder import is_replaced
from .model_card import CARD, rename_in_card
from .saved_report import read_report, write_report

_CREATE_KEYWORDS = ("token", "private")
_UPLOAD_KEYWORDS = ("token", "revision", "commit_message", "commit_description", "create_pr")
_FIELDS = {"token": "hub_token", "private": "hub_private_repo", "revision": "hub_revision"}
"""For keywords the fields of `TrainingArguments` that count where the caller gives none."""


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that an upload does not take.

    Args:
        keywords: What `save_slimmed` was given beside its own arguments.

    Raises:
        TypeError: If one is unknown; the message lists those that are known.
        ValueError: If a pull request is to be made from a revision.
    """
    unknown = sorted(set(keywords) - {*_CREATE_KEYWORDS, *_UPLOAD_KEYWORDS})
    if unknown:
        known = ", ".join(dict.fromkeys((*_CREATE_KEYWORDS, *_UPLOAD_KEYWORDS)))
        raise TypeError(
            f"save_slimmed() got an unexpected keyword argument {unknown[0]!r}; for the Hub it takes {known}."
        )
    if keywords.get("create_pr") and keywords.get("revision") is not None:
        raise ValueError(
            f"create_pr=True opens a pull request against the main branch, so revision={keywords['revision']!r} "
            "cannot be used with it; give one of the two."
        )


def add_hub_fields(keywords: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """Add what the training arguments say of the Hub, as `Trainer.push_to_hub` takes it from there.

    Args:
        keywords: What the caller gives.
        arguments: The `TrainingArguments`; None without a trainer.

    Returns:
        The keywords, and for those that are not given or None the values of the arguments' fields, if they have one.
    """
    values = dict(keywords)
    for key, field in _FIELDS.items():
        if values.get(key) is None and not (key == "revision" and values.get("create_pr")):
            values[key] = getattr(arguments, field, None)
    return {key: value for key, value in values.items() if value is not None}


def push_folder(folder: Path, written: Sequence[PurePosixPath], repo_id: str, keywords: Mapping[str, Any]) -> str:
    """Upload the files that a save wrote, and delete those of the model that they replace in the same commit.

    Args:
        folder: Where the files are; what else is in it stays here. The model card gets the whole name of the
            repository.
        written: The files to upload, relative to the folder.
        repo_id: The repository, with or without the user's name; made if it is not there.
        keywords: Those of `check_keywords`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        RuntimeError: If any of it fails; the folder is whole.
    """
    create = {key: keywords[key] for key in _CREATE_KEYWORDS if key in keywords}
    upload = {key: keywords[key] for key in _UPLOAD_KEYWORDS if key in keywords}
    upload.setdefault("commit_message", "Upload slim model")
    revision, token = upload.get("revision"), upload.get("token")
    api = HfApi()
    given = repo_id
    try:
        repo_id = api.create_repo(given, exist_ok=True, **create).repo_id
        if given != repo_id:
            rename_in_card(folder / CARD, given, repo_id)
            write_report(folder, read_report(folder)._replace(name=repo_id))
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision, token=token)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in sorted(there) if is_replaced(PurePosixPath(name), written)),
                *(CommitOperationAdd(str(path), folder / path) for path in written),
            ],
            **upload,
        )
    except Exception as error:
        reason = str(error).rstrip(".")
        raise RuntimeError(
            f"The upload to {repo_id} failed: {reason}. The slim model is whole in {folder}: upload it with "
            f"`{_make_command(folder, written, repo_id, keywords)}`, or save it again."
        ) from error
    return commit.pr_url or commit.commit_url


def _make_command(folder: Path, written: Sequence[PurePosixPath], repo_id: str, keywords: Mapping[str, Any]) -> str:
    """The command that uploads the same files to the same place, and no others that are in the folder."""
    words = ["hf", "upload", repo_id, str(folder)]
    if keywords.get("private"):
        words.append("--private")
    if keywords.get("create_pr"):
        words.append("--create-pr")
    if keywords.get("revision"):
        words += ["--revision", keywords["revision"]]
    there = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    if there != {Path(path) for path in written}:
        words += [word for path in written for word in ("--include", str(path))]
    return shlex.join(words)
