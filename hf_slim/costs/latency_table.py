"""Times that were measured, in a file of the cache folder: once for each device and shape."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


class LatencyTable:
    """Measured milliseconds by name, read from a file and written to it as they are measured.

    Args:
        key: What tells the machine and the model from others, as plain JSON data.

    Attributes:
        path: The file, in `hf_slim/latency` of the cache folder of Hugging Face (`HF_HOME`).
    """

    def __init__(self, key: Mapping[str, Any]) -> None:
        """See the class."""
        self._key = dict(key)
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(constants.HF_HOME) / "hf_slim" / "latency" / f"{digest}.json"
        self._times = self._read()

    def find(self, name: str, measure: Callable[[], float]) -> float:
        """A time, measured if it is not known.

        Args:
            name: What is timed.
            measure: Gives the milliseconds.

        Returns:
            Milliseconds.
        """
        if name not in self._times:
            self._times[name] = measure()
            self._write()
        return self._times[name]

    def __contains__(self, name: str) -> bool:
        """Whether a time is known."""
        return name in self._times

    def _read(self) -> dict[str, float]:
        if not self.path.is_file():
            return {}
        try:
            times = json.loads(self.path.read_text(encoding="utf-8"))["ms"]
            if all(isinstance(time, float) and time > 0 for time in times.values()):
                return times
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ValueError(f"The table of measured times {self.path} is damaged: delete it, and they are measured anew.")

    def _write(self) -> None:
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps({"of": self._key, "ms": self._times}, indent=1), encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            raise ValueError(
                f"slim_target_latency keeps what it measures in {self.path.parent}, which cannot be written: {error}. "
                "Set HF_HOME to a folder that can."
            ) from error


def make_key(model: nn.Module, device: torch.device, batches: Any) -> dict[str, Any]:
    """What measured times depend on.

    Args:
        model: The dense model; values do not matter.
        device: Where it computes.
        batches: The inputs of each transformers model in it.

    Returns:
        Device, threads, versions, the class of the model, its shape and that of the inputs.
    """
    shape = {name: [str(p.dtype), *p.shape] for name, p in model.named_parameters()}
    config = getattr(model, "config", None)
    return {
        "device": _name_device(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": type(model).__name__,
        "attention": getattr(config, "_attn_implementation_internal", None),
        "shape": hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16],
        "inputs": [{name: list(tensor.shape) for name, tensor in batch.items()} for batch in batches],
    }


def _name_device(device: torch.device) -> str:
    if device.type != "cpu":
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
