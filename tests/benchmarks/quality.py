"""What slimming costs in quality: six tasks, and for each of them every way to a slim model in the same steps.

    python tests/benchmarks/quality.py --data DATA --output_dir quality

DATA is a folder with `trec/{train,test}.csv`, `stsb/{train,dev}.csv`, `tinyshakespeare/input.txt` and
`bert-vocab/vocab.txt`. A dense model is trained well first, from scratch; then every method takes the same number of
further steps, each at the best learning rate of a grid, which the first seed chooses and which is continued while its
end is the best. What has been run is kept in the output folder, line by line in `runs.jsonl`, so that a run that was
stopped goes on; at the end there are a page and a plot beside it, or in the place of `--page`. All six tasks take some
hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from quality_methods import METHODS, run, train_dense
from quality_page import choose_rate, write_page
from quality_tasks import DATA, TASKS
from tqdm import tqdm
from transformers.utils import logging

RATES = (0.25, 0.5, 1.0)
"""Learning rates of the further steps, as parts of that at which the dense model was trained: where tries begin."""
LOWEST, HIGHEST = 1 / 16, 4.0
"""How far a rate is halved or doubled while that helps."""
DENSE = (0.0, 0.0)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: Name of the task.
        method: Name of the method, `base` for the training of the dense model.
        sparsities: Of FFN2 columns and of heads.
        rate: Learning rate, as a part of that of the dense training.
        seed: The seed.
    """

    task: str
    method: str
    sparsities: tuple[float, float]
    rate: float
    seed: int


class Results:
    """What has been run, kept in a file line by line."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self._path = path
        self.found: dict[Run, dict[str, float]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            values = entry.pop("result")
            self.found[Run(**{**entry, "sparsities": tuple(entry["sparsities"])})] = values

    def add(self, run: Run, result: dict[str, float]) -> None:
        """Keep a result."""
        self.found[run] = result
        with self._path.open("a") as file:
            file.write(json.dumps({**asdict(run), "result": result}) + "\n")

    def best_rate(self, task: str, method: str, sparsities: tuple[float, float], seed: int) -> float:
        """The learning rate with the lowest loss."""
        return choose_rate(
            {r.rate: v for r, v in self.found.items() if r == Run(task, method, sparsities, r.rate, seed)}
        )


def carry_out(run_: Run, options: argparse.Namespace, teacher_rate: float | None) -> dict[str, float]:
    """One training in a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    DATA[:] = [options.data]
    task = TASKS[run_.task]
    task = replace(task, steps=math.ceil(options.part * task.steps), further=math.ceil(options.part * task.further))
    dense = options.output_dir / f"{task.name}-{run_.seed}"
    if run_.method == "base":
        return train_dense(task, dense, run_.seed)
    rate = run_.rate if run_.method == "dense" else teacher_rate
    trained_on = options.output_dir / f"{task.name}-{run_.seed}-{rate}"
    return run(task, METHODS[run_.method], run_.sparsities, run_.rate * task.rate, run_.seed, dense, trained_on)


def plan(options: argparse.Namespace, results: Results) -> Iterator[list[Run]]:
    """The trainings in the order in which they need each other; a list of what can be run side by side."""
    first, *others = options.seeds
    yield [Run(task, "base", DENSE, 1.0, seed) for task in options.tasks for seed in options.seeds]
    asked = [tuple(map(float, pair.split(","))) for pair in options.sparsities]
    methods = [method for method in options.methods if method != "dense"]
    for cells in ([("dense", DENSE)], [(method, pair) for pair in asked for method in methods]):
        tried = {(task, *cell): set(_rates(cell[0])) for task in options.tasks for cell in cells}
        more = tried
        while more:
            yield [Run(*cell, rate, first) for cell, rates in more.items() for rate in sorted(rates)]
            more = {cell: _beside(results.best_rate(*cell, first), rates) - rates for cell, rates in tried.items()}
            more = {cell: rates for cell, rates in more.items() if rates}
            for cell, rates in more.items():
                tried[cell] |= rates
        yield [
            Run(task, method, pair, results.best_rate(task, method, pair, first), seed)
            for task in options.tasks
            for method, pair in cells
            for seed in others
        ]


def _beside(best: float, tried: set[float]) -> set[float]:
    """The rates beside the best one; none where there is nothing to choose."""
    return {rate for rate in (best / 2, best * 2) if LOWEST <= rate <= HIGHEST} if len(tried) > 1 else set()


def _rates(method: str) -> tuple[float, ...]:
    if METHODS[method].is_fresh:
        return RATES[1:]
    return RATES if METHODS[method].part else RATES[:1]


def main() -> None:
    """Run what has not been run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("quality"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--sparsities", nargs="+", default=["0.5,0.5", "0.8,0.6", "0.9,0.8"])
    parser.add_argument("--page", type=Path, help="Page whose figures are replaced")
    parser.add_argument("--part", type=float, default=1.0, help="Part of all steps, to try it")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = Results(options.output_dir / "runs.jsonl")
    with ProcessPoolExecutor(options.workers) as pool:
        for runs in plan(options, results):
            missing = [run for run in runs if run not in results.found]
            waiting = {
                pool.submit(carry_out, run, options, _teacher_rate(results, run, options)): run for run in missing
            }
            for done in tqdm(as_completed(waiting), total=len(missing), disable=not missing):
                results.add(waiting[done], done.result())
    page = options.page or options.output_dir / "quality.md"
    write_page(results.found, page)
    print(page.read_text())


def _teacher_rate(results: Results, run: Run, options: argparse.Namespace) -> float | None:
    """The learning rate of the dense model that was trained on, once that is known."""
    if run.method in ("base", "dense"):
        return None
    return results.best_rate(run.task, "dense", DENSE, options.seeds[0])


if __name__ == "__main__":
    main()
