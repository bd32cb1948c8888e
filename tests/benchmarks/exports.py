"""Slim against dense in onnxruntime and OpenVINO, float32 and int8, by turns, for five families.

`python tests/benchmarks/exports.py --write docs/ways-out.md` takes a model of each family (random weights: times do
not depend on them), removes about half of its channels and heads, in each layer another number, channels in multiples
of 64, and puts the table into the page. All runtimes have as many threads as `--threads`. Every round runs each
variant once, dense and slim one after the other, so that what else the machine does hits both; medians over the
rounds. Some 15 minutes on two cores; `--layers 2 --rounds 2` tries it out.
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
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from hf_slim.costs.timing import time_alternately

sys.path.insert(0, str(Path(__file__).parents[1]))
from way_models import slim_to  # noqa: E402
from ways import export_onnx, export_onnx_by_transformers, quantize_onnx, run_onnx, run_openvino  # noqa: E402
from ways_out import name_versions  # noqa: E402

START, END = "<!-- speed -->", "<!-- end of speed -->"
LENGTH = 128
Runners = dict[str, dict[str, Callable[[Any], Any]]]
"""For each runtime what runs the dense and the slim model."""


class Shape(NamedTuple):
    """A model to measure: its class and config, what it is like, and what writes its ONNX file."""

    model_class: str
    config_class: str
    fields: dict[str, Any]
    layers: str
    like: str
    export: Callable[[PreTrainedModel, Path], Path] = export_onnx


SHAPES = {
    "BERT": Shape(
        "BertForSequenceClassification",
        "BertConfig",
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 1536},
        "num_hidden_layers",
        "bge-small",
    ),
    "GPT-2": Shape("GPT2LMHeadModel", "GPT2Config", {"n_layer": 6}, "n_layer", "distilgpt2"),
    "Llama": Shape(
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 12,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
        },
        "num_hidden_layers",
        "12 of the 30 layers of SmolLM-135M",
    ),
    "T5": Shape(
        "T5EncoderModel",
        "T5Config",
        {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
        "num_layers",
        "the encoder of t5-small",
        export_onnx_by_transformers,
    ),
    "ViT": Shape(
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
        "num_hidden_layers",
        "ViT-small, a picture of 224 x 224",
    ),
}


def make_runners(shape: Shape, layers: int | None, folder: Path) -> tuple[Runners, dict[str, torch.Tensor]]:
    """Build a model, slim it, and load both into the runtimes.

    Args:
        shape: Which model.
        layers: How many layers it has; None for those of its shape.
        folder: Where to write.

    Returns:
        What runs them, and the inputs, of one text or picture.
    """
    fields = shape.fields | ({} if layers is None else {shape.layers: layers})
    torch.manual_seed(0)
    config = getattr(transformers, shape.config_class)(**fields, use_cache=False)
    dense = getattr(transformers, shape.model_class)(config).eval()
    runners: Runners = {}
    for name, model in {"dense": dense, "slim": slim_to(dense, "multiples of 64")}.items():
        (folder / name).mkdir()
        path = shape.export(model, folder / name / "model.onnx")
        found = {
            "PyTorch, float32": lambda batch, model=model: model(**batch),
            "onnxruntime, float32": run_onnx(path),
            "onnxruntime, int8 (`quantize_dynamic`)": run_onnx(quantize_onnx(path, folder / name / "int8.onnx")),
            "OpenVINO, float32": run_openvino(path),
            "OpenVINO, int8 weights (NNCF)": run_openvino(path, int8=True),
        }
        for runtime, run in found.items():
            runners.setdefault(runtime, {})[name] = run
    return runners, make_batch(dense)


def make_batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Make the inputs of a model, of one text or picture."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.zeros(1, 3, model.config.image_size, model.config.image_size)}
    ids = torch.randint(1, 30000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def measure(family: str, runners: Runners, batch: dict[str, torch.Tensor], rounds: int) -> list[str]:
    """Measure all by turns.

    Args:
        family: What the rows say.
        runners: As from `make_runners`.
        batch: The inputs.
        rounds: How often each runs.

    Returns:
        The rows of the table.
    """
    calls = {
        f"{runtime}, {name}": functools.partial(run, batch)
        for runtime, runs in runners.items()
        for name, run in runs.items()
    }
    times = time_alternately(calls, repeats=rounds, device=torch.device("cpu"), desc=family, warm_up=1)
    lines = []
    for runtime in runners:
        dense, slim = times[f"{runtime}, dense"], times[f"{runtime}, slim"]
        ratio = statistics.median(d / s for d, s in zip(dense, slim, strict=True))
        medians = (1000 * statistics.median(found) for found in (dense, slim))
        lines.append(
            f"| {family} | {runtime} | " + " | ".join(f"{found:.1f}" for found in medians) + f" | {ratio:.2f} |"
        )
    return lines


def main() -> None:
    """Parse the flags, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="so many in every model, to try it out")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    lines = ["| family | runtime | dense, ms | slim, ms | times as fast |", "| --- | --- | --- | --- | --- |"]
    for family in flags.families:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(family, *make_runners(SHAPES[family], flags.layers, Path(folder)), flags.rounds)
        print(*found, sep="\n", flush=True)
        lines += found
    table = "\n".join(lines)
    models = "; ".join(f"{family}: {SHAPES[family].like}" for family in flags.families)
    notes = (
        f"{models}. One text of {LENGTH} tokens, {flags.threads} thread(s) of {_name_processor()}, medians of "
        f"{flags.rounds} rounds. {name_versions()}"
    )
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
