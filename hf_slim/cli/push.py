"""`hf-slim push`: the folder of a slim model uploaded to the Hub."""

from __future__ import annotations

from ..saving import push_slimmed


def push(folder: str, repo_id: str, *, private: bool, token: str | None, revision: str | None, create_pr: bool) -> str:
    """Upload the folder of a slim model, in one commit.

    Args:
        folder: A folder that `save_slimmed` wrote.
        repo_id: The repository; made if it is not there.
        private: Make it private, if it is made.
        token: A token with the right to write; that of the login if it is not given.
        revision: A branch; made if it is not there.
        create_pr: Open a pull request in place of pushing.

    Returns:
        What was uploaded where.

    Raises:
        ValueError: If the folder holds no slim model, or an argument does not fit.
        RuntimeError: If the upload fails; the folder is whole.
    """
    given = {"private": private or None, "token": token, "revision": revision, "create_pr": create_pr or None}
    url = push_slimmed(folder, repo_id, **{name: value for name, value in given.items() if value is not None})
    return f"Uploaded {folder} to {repo_id}: {url}"
