"""Slim every model type that an Auto class of transformers serves, and say what became of each.

`python tests/sweep.py --write docs/architectures.md` runs all types, each in a process of its own, and writes the page
of supported architectures; `--types bert,gpt2` runs some.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import model_types
from tqdm import tqdm
from verdict import KINDS, Verdict, sweep_type

TIMEOUT = 120.0
COMMAND = "python tests/sweep.py --write docs/architectures.md"
PAGE = """# Supported architectures

{meaning}

That is for transformers {version} and every model type that an Auto class serves. The page is made by
`{command}`, which builds a tiny model of each type, zeroes half of its units, slims it, and compares its outputs, its
reloaded copy and its generated text with the masked model's: in float32, and where that differs, in float64.

{summary}

`slimmed` counts the structures of the tiny model; `-` means that the type has no such module of linear layers. What is
`not proven` are structures whose layers the made inputs do not call, so that no comparison says anything about them;
`model_slim` and `save_slimmed` name them, and take a batch of yours that reaches them. The numbers in the notes are
those of the [reasons](#reasons) at the end of the page.

| type | FFN | attention | note |
| --- | --- | --- | --- |
{rows}

## Not built or not run

No tiny model of these types could be made, or none runs on made inputs. That says nothing about yours: `hf-slim
inspect` shows what can be slimmed in it, and it is compared when it is saved, on a batch of yours where no input can
be made.

| type | why |
| --- | --- |
{failed}

## Reasons

{reasons}
"""


def sweep(types: Sequence[str], jobs: int = 2) -> list[Verdict]:
    """Sweep types, each in a process of its own, so that a crash or a hang of one is a verdict, too.

    Args:
        types: Model types.
        jobs: How many at a time.

    Returns:
        A verdict for each, in their order.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(types))
    running: dict[Any, tuple[str, Any, float]] = {}
    verdicts: dict[str, Verdict] = {}
    with tqdm(total=len(types), unit="type") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                model_type = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(model_type, sender))
                process.start()
                sender.close()
                running[receiver] = (model_type, process, time.monotonic())
            ready = wait(list(running), timeout=1)
            for receiver, (model_type, process, start) in list(running.items()):
                if receiver in ready:
                    verdicts[model_type] = _receive(receiver, model_type)
                elif time.monotonic() - start > TIMEOUT:
                    process.kill()
                    verdicts[model_type] = Verdict(model_type, error=f"not finished after {TIMEOUT:.0f} s")
                else:
                    continue
                process.join()
                receiver.close()
                del running[receiver]
                bar.update()
    return [verdicts[model_type] for model_type in types]


def _work(model_type: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sender.send(sweep_type(model_type))


def _receive(receiver: Connection, model_type: str) -> Verdict:
    try:
        return receiver.recv()
    except EOFError:
        return Verdict(model_type, error="the process crashed")


def explain(verdicts: Sequence[Verdict]) -> str:
    """What the figures mean for somebody who has a model of one of the types."""
    slimmed = [v for v in verdicts if v.ran and any(v.kinds[kind].slimmed for kind in KINDS)]
    exact = [v for v in slimmed if not v.wrong and not v.error]
    text = (
        f"A model of {len(exact)} of the {len([v for v in verdicts if v.ran])} types that could be tried is made "
        "smaller and computes what it computed before."
    )
    others = [v.model_type for v in slimmed if v.wrong or v.error]
    if others:
        text += (
            f" {', '.join(others)} did not pass: see the notes; `save_slimmed` and `model_slim` refuse such a model."
        )
    return f"{text} Modules that are skipped stay as they are, for the reason in the notes, and the model stays right."


def summarize(verdicts: Sequence[Verdict]) -> str:
    """The counts, a line each."""
    built, ran = [v for v in verdicts if v.built], [v for v in verdicts if v.ran]
    lines = [f"- {len(verdicts)} types, {len(built)} built, {len(ran)} of them run on made inputs"]
    for kind, name in zip(KINDS, ("FFN", "attention"), strict=True):
        states = Counter(v.kinds[kind].state for v in ran)
        having = sum(states.values()) - states["none"]
        share = 100 * states["slimmed"] / max(1, having)
        lines.append(
            f"- {name}: {having} types have it, {states['slimmed']} slimmed ({share:.1f} %), {states['skipped']} "
            f"skipped with a reason, {states['not found']} not found"
        )
    structures = sum(v.kinds[kind].slimmed for v in ran for kind in KINDS)
    unproven = sum(len(v.unproven) for v in ran)
    lines.append(f"- {structures} structures slimmed, {unproven} of them not proven, since no made input reaches them")
    for name, found in (
        ("slimmed models that compute something else", [v for v in verdicts if v.wrong]),
        ("errors", [v for v in verdicts if v.error]),
        ("types with structures that no output depends on, with these inputs", [v for v in verdicts if v.unreached]),
        ("generations compared", [v for v in verdicts if v.generation.startswith("compared")]),
    ):
        lines.append(f"- {len(found)} {name}")
    return "\n".join(lines)


def write_page(verdicts: Sequence[Verdict], path: Path) -> None:
    """Write the page of supported architectures."""
    numbers: dict[str, int] = {}
    rows = []
    for verdict in verdicts:
        if verdict.ran:
            notes = [_refer(what, reasons, numbers) for what, reasons in _notes(verdict)]
            rows.append(
                f"| {verdict.model_type} | {_cell(verdict, 'ffn')} | {_cell(verdict, 'mha')} | {'; '.join(notes)} |"
            )
    failed = [f"| {v.model_type} | {_escape(v.reason or v.error)} |" for v in verdicts if not v.ran]
    text = PAGE.format(
        version=transformers.__version__,
        command=COMMAND,
        meaning=explain(verdicts),
        summary=summarize(verdicts),
        rows="\n".join(rows),
        failed="\n".join(failed),
        reasons="\n".join(f"[^{number}]: {_escape(reason)}" for reason, number in numbers.items()),
    )
    path.write_text(text, encoding="utf-8")


def _cell(verdict: Verdict, kind: str) -> str:
    result = verdict.kinds[kind]
    if result.state == "none":
        return "-"
    return f"slimmed {result.slimmed}" if result.slimmed else result.state


def _notes(verdict: Verdict) -> list[tuple[str, list[str]]]:
    """What there is to say beside the counts, each with its reasons or with the names of the structures."""
    notes = [("**wrong**", [verdict.wrong])] if verdict.wrong else []
    notes += [("**error**", [verdict.error])] if verdict.error else []
    for kind, name in zip(KINDS, ("FFN", "attention"), strict=True):
        skipped = verdict.kinds[kind].skipped
        if skipped:
            notes.append((f"{name}, {len(skipped)} skipped", _generalize(reason for _, reason in skipped)))
    notes += [("reloading not compared", [verdict.not_reloaded])] if verdict.not_reloaded else []
    if verdict.unproven:
        names = [f"not proven: {name}" for name in _generalize(verdict.unproven)]
        notes.append((f"{len(verdict.unproven)} not proven", names))
    elif verdict.unreached:
        names = [f"not reached by the inputs: {name}" for name in _generalize(verdict.unreached)]
        notes.append((f"{len(verdict.unreached)} not reached by the inputs", names))
    return notes


def _generalize(reasons: Iterable[str]) -> list[str]:
    """The reasons without the numbers of layers, each once: those of equal blocks are equal then."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|\b)", ".*", " ".join(reason.split())) for reason in reasons))


def _refer(what: str, reasons: Sequence[str], numbers: dict[str, int]) -> str:
    """A note with the footnotes of its reasons, which are numbered as they come."""
    marks = [f"[^{numbers.setdefault(reason, len(numbers) + 1)}]" for reason in reasons]
    return f"{what} {' '.join(marks)}"


def _escape(text: str) -> str:
    text = re.sub(r" from '[^']*'", "", text)  # where transformers is installed
    return re.sub(r"([|*<])", r"\\\1", text)


def main() -> None:
    """Parse the flags, sweep, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", type=lambda text: text.split(","), default=model_types())
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the verdicts there")
    parser.add_argument("--write", type=Path, help="write the page there")
    flags = parser.parse_args()
    verdicts = sweep(flags.types, flags.jobs)
    for verdict in verdicts:
        notes = "; ".join(f"{what}: {' / '.join(reasons)}" for what, reasons in _notes(verdict))
        trouble = notes if verdict.ran else verdict.reason or verdict.error
        states = " ".join(f"{kind}: {_cell(verdict, kind)}," for kind in KINDS) if verdict.ran else "not run:"
        print(f"{verdict.model_type}: {states} {trouble}")
    print(summarize(verdicts))
    if flags.json:
        flags.json.write_text(json.dumps([asdict(v) for v in verdicts], indent=1), encoding="utf-8")
    if flags.write:
        write_page(verdicts, flags.write)


if __name__ == "__main__":
    main()
