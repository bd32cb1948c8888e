"""`hf-slim compact`: the zero units of an already sparse model removed, with proof, and everything else kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import logging

from ..arguments import SlimConfig
from ..saving import SlimReport, check_folder, count_parameters, save_slimmed
from .model_source import check_place, load_model

logger = logging.get_logger(__name__)

_LEFT_OUT = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt", "*.onnx", "*.gguf", "*.ot"),
    *("*.index.json", "config.json", "adapter_config.json", "trainer_state.json", "modeling_hf_slim.py", ".*"),
)
"""Files beside a model that hold its weights in whatever form, or the state of a training, or are written anew."""
_TEMPLATES = "additional_chat_templates"
"""Where tokenizers and processors keep further templates; the only folder of theirs."""


def compact(model: str, output_dir: str) -> SlimReport:
    """Remove the zero units of a saved model, and save the slim one with the tokenizer and the other files.

    Args:
        model: A folder or a Hub name.
        output_dir: The folder for the slim model.

    Returns:
        The sizes before and after.

    Raises:
        ValueError: If the model cannot be slimmed.
        OSError: If there is no such model, or the folder cannot be written.
        VerificationError: If the slim model computes something else; nothing is written.
    """
    check_folder(output_dir)
    check_place("IN", model)
    loaded = load_model(model)
    folder = model if Path(model).is_dir() else snapshot_download(model, ignore_patterns=list(_LEFT_OUT))
    parameters = count_parameters(loaded)
    report = save_slimmed(loaded, output_dir, processing_class=_OtherFiles(Path(folder)))
    if report.parameters_after == parameters < report.parameters_before:  # else save_slimmed says so
        logger.warning(
            f"No unit of {model} is zero, or too few for a multiple of {SlimConfig().slim_round_to}, so that nothing "
            f"was removed: {output_dir} holds the same model."
        )
    return report


@dataclass(frozen=True)
class _OtherFiles:
    """What lies beside the weights of a model, saved like a tokenizer, since it is saved with one."""

    folder: Path

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Copy the files, but for those that are there."""
        for path in self._find():
            copy = Path(folder) / path.relative_to(self.folder)
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)

    def _find(self) -> Iterator[Path]:
        yield from (path for path in self.folder.iterdir() if path.is_file() and not _matches(path, _LEFT_OUT))
        yield from (self.folder / _TEMPLATES).glob("*.jinja")
        modules = self.folder / "modules.json"  # a model of sentence-transformers has folders of further modules
        for part in json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else ():
            if part["path"]:
                yield from (path for path in (self.folder / part["path"]).rglob("*") if path.is_file())


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)
