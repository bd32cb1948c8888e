"""Slim against dense in onnxruntime and OpenVINO, float32 and int8, by turns.

`python tests/benchmarks/exports.py --write docs/ways-out.md` takes an encoder of the shape of bge-small (random
weights: times do not depend on them), removes half of its channels and heads, in each layer another number, and puts
the table into the page. All runtimes have as many threads as `--threads`. Every round runs each variant once, dense
and slim one after the other, so that what else the machine does hits both; medians over the rounds. Some 5 minutes.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_slim.costs.timing import time_alternately

sys.path.insert(0, str(Path(__file__).parents[1]))
from way_models import slim_to  # noqa: E402
from ways import export_onnx, quantize_onnx, run_onnx, run_openvino  # noqa: E402
from ways_out import name_versions  # noqa: E402

START, END = "<!-- speed -->", "<!-- end of speed -->"
SHAPE = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536}


def make_variants(folder: Path) -> dict[str, dict[str, Callable[[Any], Any]]]:
    """Build the runtimes, for each the dense and the slim model."""
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig(vocab_size=30522, **SHAPE)).eval()
    variants: dict[str, dict[str, Callable[[Any], Any]]] = {}
    for name, model in {"dense": dense, "slim": slim_to(dense, "non-uniform")}.items():
        path = export_onnx(model, folder / f"{name}.onnx")
        (folder / name).mkdir()
        found = {
            "PyTorch, float32": lambda batch, model=model: model(**batch),
            "onnxruntime, float32": run_onnx(path),
            "onnxruntime, int8 (`quantize_dynamic`)": run_onnx(quantize_onnx(path, folder / name / "int8.onnx")),
            "OpenVINO, float32": run_openvino(path),
            "OpenVINO, int8 weights (NNCF)": run_openvino(path, int8=True),
        }
        for runtime, run in found.items():
            variants.setdefault(runtime, {})[name] = run
    return variants


@torch.no_grad()
def measure(variants: dict[str, dict[str, Callable[[Any], Any]]], rounds: int, rows: int, length: int) -> list[str]:
    """Measure all by turns.

    Args:
        variants: As from `make_variants`.
        rounds: How often each runs.
        rows: The size of the batch.
        length: The length of its texts.

    Returns:
        The rows of the table.
    """
    ids = torch.randint(1, 30000, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls = {
        f"{runtime}, {name}": functools.partial(run, batch)
        for runtime, runs in variants.items()
        for name, run in runs.items()
    }
    size = f"{rows} x {length}"
    times = time_alternately(calls, repeats=rounds, device=torch.device("cpu"), desc=size, warm_up=1)
    lines = []
    for runtime in variants:
        dense, slim = times[f"{runtime}, dense"], times[f"{runtime}, slim"]
        ratio = statistics.median(d / s for d, s in zip(dense, slim, strict=True))
        medians = (1000 * statistics.median(found) for found in (dense, slim))
        lines.append(
            f"| {size} | {runtime} | " + " | ".join(f"{found:.1f}" for found in medians) + f" | {ratio:.2f} |"
        )
    return lines


def main() -> None:
    """Parse the flags, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="put the table into this page")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    lines = ["| batch | runtime | dense, ms | slim, ms | times as fast |", "| --- | --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(Path(folder))
        for rows, length in ((1, 32), (1, 128), (4, 128)):
            lines += measure(variants, flags.rounds, rows, length)
    table = "\n".join(lines)
    notes = f"{flags.threads} thread(s) of {_name_processor()}, medians of {flags.rounds} rounds. {name_versions()}"
    print(table, notes, sep="\n\n")
    if flags.write:
        before, _, rest = flags.write.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        text = f"{before}{START}\n{table}\n\n{notes}\n{END}{after}"
        flags.write.write_text(text, encoding="utf-8")


def _name_processor() -> str:
    """What the processor calls itself, where Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
