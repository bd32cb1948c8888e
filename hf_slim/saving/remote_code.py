"""What is saved beside a slim model, so that it loads where hf_slim is not installed."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

from transformers import PreTrainedConfig

from .. import modeling_hf_slim
from ..compaction import REMOTE_MODULE, has_remote_code, make_auto_map


def portable(config: PreTrainedConfig, folder: str | os.PathLike[str]) -> PreTrainedConfig:
    """Write the resizing file of a slim model beside its config.

    Args:
        config: The config that is about to be saved; not changed.
        folder: The folder, which need not exist.

    Returns:
        The config to save in its place: with an `auto_map` that names the file, or without one that did.
    """
    auto_map = make_auto_map(config)
    if auto_map == config.__dict__.get("auto_map"):
        saved = config
    else:
        saved = copy.copy(config)
        saved.__dict__.pop("auto_map", None)
        if auto_map is not None:
            saved.auto_map = auto_map
    if has_remote_code(config) and not os.path.isfile(folder):
        os.makedirs(folder, exist_ok=True)
        shutil.copyfile(modeling_hf_slim.__file__, Path(folder, f"{REMOTE_MODULE}.py"))
    return saved
