"""Where hf_slim itself is to be had: its repository, until a package index has it."""

from __future__ import annotations

import json
from importlib import metadata

REPOSITORY: str | None = None
"""The address of the repository. None as long as none is known: a card must not name one that anybody could take."""


def find_install_command() -> str:
    """How hf_slim is installed.

    Returns:
        The command, from `REPOSITORY`, or else from the repository and commit that it was itself installed from; a
        clone of the repository is needed for it where neither is known.
    """
    source = f"git+{REPOSITORY}" if REPOSITORY is not None else _find_own_source()
    return f'pip install "{source}"' if source else "pip install ."


def _find_own_source() -> str | None:
    """The repository and the commit that `pip` has noted when it installed hf_slim from there (PEP 610)."""
    try:
        noted = metadata.distribution("hf-slim").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    source = json.loads(noted) if noted else {}
    if source.get("vcs_info", {}).get("vcs") != "git" or not source["url"].startswith("https://"):
        return None
    return f"git+{source['url']}@{source['vcs_info']['commit_id']}"
