"""The flags of `hf-slim bench`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from ..arguments import SlimConfig, check_whole

PARTS = ("train", "run", "inference", "times", "memory")
"""What can be measured."""
_DTYPES = ("float32", "bfloat16")


class Sparsity(NamedTuple):
    """What is removed of each layer.

    Args:
        ffn2: Fraction of the intermediate channels.
        mha: Fraction of the attention heads or key-value groups.
    """

    ffn2: float
    mha: float

    def __str__(self) -> str:
        """As the flag says it."""
        return f"{self.ffn2:g},{self.mha:g}"


@dataclass
class BenchArguments:
    """What to measure, and on what.

    Raises:
        ValueError: If a value is out of range; the message names the flag and quotes the value.
    """

    models: list[str] = field(
        metadata={
            "help": "Shapes: bge-small, bge-base, bert-large, gpt2, llama-1b, or a folder or .json file with the "
            "config of a text model. Models are built from the config, with random weights."
        }
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Sequences in a batch."})
    sequence_lengths: list[int] = field(default_factory=lambda: [128], metadata={"help": "Tokens in a sequence."})
    sparsities: list[str] = field(
        default_factory=lambda: ["0.8,0.6"],
        metadata={"help": "FFN2 and MHA sparsity, with a comma between them; several are drawn as a curve."},
    )
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={
            "help": f"What to measure: {', '.join(PARTS)}. The memory is that of the parts beside it, or of all."
        },
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Build every model with these numbers of layers, to see how the costs grow."}
    )
    repeats: int = field(default=20, metadata={"help": "Timed rounds; medians of them are given."})
    run_steps: int = field(default=100, metadata={"help": "Optimizer steps of a fine-tuning run."})
    run_repeats: int = field(default=2, metadata={"help": "Fine-tuning runs of each kind."})
    threads: int | None = field(default=None, metadata={"help": "Threads that PyTorch uses; default: its own choice."})
    dtype: str = field(default="float32", metadata={"help": f"Type of the weights: {', '.join(_DTYPES)}."})
    device: str = field(default="cpu", metadata={"help": "Where to measure: cpu or cuda."})
    output_dir: str = field(
        default="hf_slim_bench", metadata={"help": "Folder for bench.json, bench.md and speedup.png."}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without building a model."""
        for name in ("models", "batch_sizes", "sequence_lengths", "sparsities", "parts"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty: give one value at least.")
        for name in ("batch_sizes", "sequence_lengths", "layers"):
            for value in getattr(self, name) or ():
                check_whole(f"--{name}", value)
        for name in ("repeats", "run_steps", "run_repeats", "threads"):
            if getattr(self, name) is not None:
                check_whole(f"--{name}", getattr(self, name))
        for part in self.parts:
            _check_choice("parts", part, PARTS)
        _check_choice("dtype", self.dtype, _DTYPES)
        _check_choice("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU here; leave the flag out to measure on the CPU.")
        self.parsed_sparsities = [_read_sparsity(text) for text in self.sparsities]
        folder = Path(self.output_dir)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder} is a file; name a folder.")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"--output_dir {folder} is not writable; name another folder.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the weights."""
        return getattr(torch, self.dtype)


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"--{flag} must be one of {', '.join(choices)}, got {value!r}.")


def _read_sparsity(text: str) -> Sparsity:
    try:
        sparsity = Sparsity(*(float(number) for number in text.split(",")))
    except (TypeError, ValueError):
        raise ValueError(
            f"--sparsities takes two numbers with a comma between them (FFN2,MHA), such as 0.8,0.6, got {text!r}."
        ) from None
    try:
        SlimConfig(ffn2_sparsity=sparsity.ffn2, mha_sparsity=sparsity.mha)
    except ValueError as error:
        raise ValueError(f"--sparsities {text}: {error}") from None
    if not any(sparsity):
        raise ValueError(f"--sparsities {text} removes nothing: one of the two must be above 0.")
    return sparsity
