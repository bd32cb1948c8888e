"""Take slim models of five families out of PyTorch, each way there is, and say how far the outputs are off.

`python tests/ways_out.py --write docs/ways-out.md` runs every way for every family, uniform and not, each in a process
of its own, and puts the table into the page; `--ways "torch.export" --families BERT,T5` runs some. Packages that are
not there are named in the table. `--json FILE` keeps what has been run, so that a run that was stopped goes on. Some
60 minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import ways
from tqdm import tqdm
from trainers import make_dpo_trainer, make_grpo_trainer
from way_models import FAMILIES, save_way_model
from ways import Subject, UnsupportedError, by_quantization_config, by_transformers, by_trl

EXACT = 1e-4
COLUMNS = ("BERT", "GPT-2", "Llama", "T5", "ViT")
START, END = "<!-- table -->", "<!-- end of table -->"


class Way(NamedTuple):
    """A way out: what runs it, how exact it is, and another shape that it also takes."""

    run: Callable[[Subject], float]
    rounds: bool = False
    shapes: tuple[str, ...] = ("uniform", "non-uniform")


WAYS = {
    "`torch.export`": Way(ways.torch_export),
    "`torch.compile`, inductor": Way(ways.torch_compile),
    "`DynamoExporter`": Way(by_transformers("Dynamo")),
    "ONNX by `torch.onnx`": Way(ways.onnx_by_torch),
    "ONNX by `OnnxExporter`": Way(by_transformers("Onnx")),
    "ONNX, `quantize_dynamic` int8": Way(ways.onnx_int8, rounds=True),
    "OpenVINO from ONNX": Way(ways.openvino_by_onnx),
    "OpenVINO by `OpenVINOExporter`": Way(by_transformers("OpenVINO")),
    "OpenVINO, int8 weights (NNCF)": Way(ways.openvino_int8, rounds=True),
    "ExecuTorch, XNNPACK": Way(ways.executorch),
    "ExecuTorch by `ExecutorchExporter`": Way(by_transformers("Executorch")),
    "GGUF, llama.cpp, float16": Way(ways.llama_cpp, rounds=True),
    "GGUF, to the weights in float16": Way(ways.llama_cpp_to_rounded, rounds=True),
    "PyTorch dynamic int8": Way(ways.torch_int8, rounds=True),
    "torchao, int8 weights": Way(by_quantization_config(ways.torchao_int8), rounds=True),
    "bitsandbytes, 8 bits": Way(by_quantization_config(ways.eight_bits), rounds=True),
    "bitsandbytes, 4 bits": Way(
        by_quantization_config(ways.four_bits), rounds=True, shapes=("uniform", "non-uniform", "multiples of 64")
    ),
    "`pipeline`": Way(ways.pipeline),
    "`SentenceTransformer`": Way(ways.sentence_transformer),
    "`CrossEncoder`": Way(ways.cross_encoder),
    "`SparseEncoder`": Way(ways.sparse_encoder),
    "TRL, DPO": Way(by_trl(make_dpo_trainer)),
    "TRL, GRPO": Way(by_trl(make_grpo_trainer)),
    "`generate_batch`": Way(ways.generate_batch),
    "stock config (vLLM, TGI)": Way(ways.stock_config),
}
SLOW_TO_IMPORT = ("onnxscript", "nncf", "executorch.exir", "sentence_transformers", "trl")
"""What is imported once, before the processes are forked."""
PACKAGES = (
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "executorch",
    "torchao",
    "bitsandbytes",
    "gguf",
    "llama-cpp-python",
    "trl",
)


class Cell(NamedTuple):
    """What became of one family and shape on one way.

    Args:
        state: `works`, `refused` (by this shape alone), `dense, too` (the dense model fails as well), `none` (there is
            no such way for the family) or `late` (it took too long to be tried).
        text: The difference or the message.
    """

    state: str
    text: str


STATES = {"refused": "refused", "dense, too": "refused, dense too", "none": "none", "late": "not tried to the end"}
"""What the table says of a cell that is no number, before the number of the message."""


def try_way(name: str, family: str, shape: str, folder: Path, limit: float) -> Cell:
    """Run one way for one family and shape; where it fails, or rounds, for the dense model, too.

    Args:
        name: A name in `WAYS`.
        family: A name in `FAMILIES`.
        shape: One of the shapes of the way.
        folder: Where to write.
        limit: How many seconds each model may take.

    Returns:
        What became of it.
    """
    way = WAYS[name]
    kind, value = _run_apart(way.run, family, shape, folder, limit)
    if kind in ("none", "late"):
        return Cell(kind, value)
    if kind == "works" and not way.rounds:
        return Cell("works", value) if float(value) <= EXACT else Cell("refused", f"off by {value}")
    dense_kind, dense = _run_dense(name, family, folder, limit)
    if kind == "works":
        return Cell("works", f"{value} (dense {dense if dense_kind == 'works' else 'fails'})")
    return Cell("dense, too" if dense_kind == "fails" else "refused", value)


@functools.cache
def _run_dense(name: str, family: str, folder: Path, limit: float) -> tuple[str, str]:
    return _run_apart(WAYS[name].run, family, "dense", folder, limit)


def _run_apart(
    run: Callable[[Subject], float], family: str, shape: str, folder: Path, limit: float
) -> tuple[str, str]:
    """Run it in a process of its own, so that a crash or a hang is a verdict, too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, family, shape, folder, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(limit) else ("late", f"not finished after {limit:.0f} s")
    except EOFError:
        answer = ("fails", "the process crashed")
    process.kill()
    process.join()
    return answer


def _work(run: Callable[[Subject], float], family: str, shape: str, folder: Path, sender: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory(dir=folder) as place:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            saved = Path(place) / shape
            difference = run(Subject(family, saved, save_way_model(family, shape, saved)))
            sender.send(("works", f"{difference:.1e}"))
        except UnsupportedError as error:
            sender.send(("none", str(error)))
        except ImportError as error:
            sender.send(("none", f"not run here: {_shorten(error)}"))
        except BaseException as error:
            sender.send(("fails", _shorten(error)))


def _shorten(error: BaseException) -> str:
    """The first line of the message of what began it, without paths and colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = re.sub(r"\x1b\[[0-9;]*m", "", re.sub(r"(/[\w.+-]+){2,}", "...", lines[0]))
    return f"{type(error).__name__}: {text}"


def make_table(cells: dict[tuple[str, str, str], Cell]) -> str:
    """Lay out the cells, a row for each way and shape, with the messages numbered below."""
    names = [name for name in WAYS if any(name == own for own, _, _ in cells)]
    notes: dict[str, int] = {}
    lines = ["| way out | sizes | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name in names:
        for shape in WAYS[name].shapes:
            row = []
            for family in COLUMNS:
                cell = cells.get((name, family, shape))
                if cell is None or cell.state == "works":
                    row.append("not run" if cell is None else cell.text)
                else:
                    row.append(f"{STATES[cell.state]} ({notes.setdefault(cell.text, len(notes) + 1)})")
            lines.append(f"| {name} | {shape} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"{number}. `{text.replace('`', chr(39))}`" for text, number in notes.items())])


def name_versions() -> str:
    """The versions of what was run, in words."""
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not installed"
    versions = ", ".join(f"{package} {version}" for package, version in packages.items())
    return f"Python {platform.python_version()}, {versions}."


def write_page(cells: dict[tuple[str, str, str], Cell], page: Path) -> None:
    """Put the table between its marks on the page.

    Args:
        cells: The cells.
        page: The page.

    Raises:
        ValueError: If the page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{page} has no {START} and {END}, between which the table goes.")
    page.write_text(f"{before}{start}\n{make_table(cells)}\n\n{name_versions()}\n{end}{after}", encoding="utf-8")


def sweep(
    names: Iterable[str], families: Iterable[str], kept: Path | None, limit: float
) -> dict[tuple[str, str, str], Cell]:
    """Try the ways, one after another.

    Args:
        names: Names in `WAYS`.
        families: Names in `FAMILIES`.
        kept: The file of what has been run.
        limit: How many seconds each model may take on each way.

    Returns:
        The cells by way, family and shape.
    """
    for package in SLOW_TO_IMPORT:
        with suppress(ImportError):
            importlib.import_module(package)
    found = {tuple(key.split("|")): Cell(*cell) for key, cell in _read(kept).items()}
    jobs = [(name, family, shape) for name in names for family in families for shape in WAYS[name].shapes]
    with tempfile.TemporaryDirectory() as folder, tqdm(jobs, unit="cell") as bar:
        for name, family, shape in bar:
            if (name, family, shape) in found and found[name, family, shape].state != "late":
                continue
            bar.set_postfix_str(f"{name}, {family}, {shape}")
            cell = found[name, family, shape] = try_way(name, family, shape, Path(folder), limit)
            bar.write(f"{name}, {family}, {shape}: {cell.state}, {cell.text}")
            if kept:
                kept.write_text(json.dumps({"|".join(key): cell for key, cell in found.items()}, indent=1))
    return {(name, family, shape): found[name, family, shape] for name, family, shape in jobs}


def _read(kept: Path | None) -> dict[str, list[str]]:
    return json.loads(kept.read_text()) if kept and kept.is_file() else {}


def main() -> None:
    """Parse the flags, sweep and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="names, with ; between")
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(COLUMNS))
    parser.add_argument("--json", type=Path, help="keep what has been run there, and go on from it")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that each model may take on each way")
    flags = parser.parse_args()
    unknown = [name for name in flags.ways if name not in WAYS] + [f for f in flags.families if f not in FAMILIES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: the ways are {'; '.join(WAYS)}, the families {', '.join(COLUMNS)}")
    cells = sweep(flags.ways, flags.families, flags.json, flags.limit)
    print(make_table(cells))
    if flags.write:
        write_page(cells, flags.write)


if __name__ == "__main__":
    main()
