"""What a card takes over from the model that was slimmed: which one it was, and its license."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from transformers import PreTrainedConfig
from yaml import YAMLError  # type: ignore[import-untyped]

_PATIENCE = 3.0  # seconds that the Hub is waited for
_LICENSE = ("license", "license_name", "license_link")


def find_base_model(config: PreTrainedConfig) -> str | None:
    """Find the repository of the Hub that a model was loaded from.

    Args:
        config: Its config.

    Returns:
        The repository; None for a folder, and for a model that was made from a config.
    """
    source = config.name_or_path
    return source if source and source.count("/") <= 1 and not Path(source).exists() else None


def find_license(config: PreTrainedConfig) -> dict[str, Any]:
    """Find the license of the model that was slimmed, on the card beside it.

    That is the `README.md` of the folder or the repository that it was loaded from: in the cache, or else on the Hub,
    which is waited for three seconds, once in a process.

    Args:
        config: The model's config.

    Returns:
        `license`, `license_name` and `license_link`, as far as the card names them; nothing if there is none that can
        be read, since no license is to be guessed.
    """
    base_model = find_base_model(config)
    if base_model is not None:
        card = _fetch_card(base_model)
    else:
        card = Path(config.name_or_path, "README.md") if config.name_or_path else None
    if card is None or not card.is_file():
        return {}
    return _read_license(card)


def _read_license(card: Path) -> dict[str, Any]:
    try:
        data: Mapping[str, Any] = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, YAMLError):  # it is not ours to mend
        return {}
    return {name: data[name] for name in _LICENSE if isinstance(data.get(name), str)}


@functools.lru_cache(maxsize=32)
def _fetch_card(repo_id: str) -> Path | None:
    """The card of a repository; None where it has none, or where there is no network."""
    try:
        cached = try_to_load_from_cache(repo_id, "README.md")
        if not isinstance(cached, str):
            get_hf_file_metadata(hf_hub_url(repo_id, "README.md"), timeout=_PATIENCE)  # the download tries for long
            cached = hf_hub_download(repo_id, "README.md")
    except Exception:  # which errors there are depends on the version of the client
        return None
    return Path(cached)
