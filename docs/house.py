"""Figures of the code, of one checkout or of several side by side, and the picture of which room imports which.

The code is read, but for the way from a setting to the slice of a weight, which a tiny training shows.

    python docs/house.py --root before=../before --root after=. --list
    python docs/house.py --picture docs/house.svg
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from house_code import (
    LONG,
    PACKAGE,
    find_cycle,
    find_imports,
    find_levels,
    find_long_functions,
    find_room_imports,
    read_sources,
    room_of,
)
from house_foreign import find_patches, find_private_names
from house_picture import draw_rooms

__all__ = ["find_imports", "find_patches", "find_private_names", "room_of"]

_BRIEF = {"<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>", "<module>"}
_WAYS = {
    "live": {"plan": r"on_\w+", "slice": r"on_\w+"},
    "masked": {"plan": r"on_\w+", "zeros": r"on_\w+", "slice": "save_slimmed"},
}
"""The parts of the way from a setting to the slice, each with the function in which it begins."""


class Row(NamedTuple):
    """A figure, and what it is made of."""

    value: str
    parts: Sequence[str] = ()


class Names(NamedTuple):
    """What functions and classes on the way from a setting to the slice are called."""

    slice: str = "take_positions"
    cut: str = "compact_model"
    plan: str = "Schedule,Plan"


def find_rows(root: Path, names: Names) -> dict[str, Row]:
    """Work out all figures of a checkout.

    Args:
        root: The checkout.
        names: Of functions and classes on the way from a setting to the slice.

    Returns:
        The rows of the table by their titles.
    """
    sources = read_sources(root)
    lines = [source.lines for source in sources]
    longest = max(sources, key=lambda source: source.lines)
    imports = find_imports(root)
    rooms = {room: set(targets) for room, targets in find_room_imports(root).items()}
    cycle, room_cycle = sorted(find_cycle(imports)), sorted(find_cycle(rooms))
    functions, patches, private = find_long_functions(root), find_patches(root), find_private_names(root)
    rows = {
        "files": Row(str(len(sources))),
        "rooms": Row(str(len(rooms))),
        "lines of the median file": Row(f"{statistics.median(lines):g}"),
        "lines of the longest file": Row(f"{longest.lines} ({Path(longest.file).name})"),
        "lines in all": Row(str(sum(lines))),
        "lines of the tests": Row(str(sum(source.lines for source in read_sources(root, "tests")))),
        "levels of imports between modules": Row(str(max(find_levels(imports).values()))),
        "levels of imports between rooms": Row(str(max(find_levels(rooms).values()))),
        "modules in the largest cycle": Row(str(len(cycle)), cycle),
        "rooms in the largest cycle": Row(str(len(room_cycle)), room_cycle),
        f"functions with more than {LONG} lines": Row(str(len(functions)), functions),
        "patches of other packages": Row(str(len(patches)), _list_places(patches)),
        "private names of other packages": Row(str(len(private)), _list_places(private)),
    }
    for way in _WAYS:
        rows[f"hops from ffn2_sparsity to the slice, {way}"] = _count_hops(find_hops(root, way, names))
    return rows


def find_hops(root: Path, way: str, names: Names) -> dict[str, list[str]]:
    """Train a tiny model with the code of a checkout, and see which functions are on the way to a weight.

    Args:
        root: The checkout.
        way: `live` or `masked`.
        names: Of functions and classes on the way.

    Returns:
        For each part of the way the functions, outermost first, as `module:name`. The parts lead from the callback's
        hook to where the plan is made; if masked, from the hook to where zeros are written; and to the slice from the
        hook or, if masked, from `save_slimmed`.

    Raises:
        RuntimeError: If the training fails, or a part of the way is not found.
    """
    given = [text for name, value in names._asdict().items() for text in (f"--{name}", value)]
    command = [sys.executable, __file__, "--trace", way, *given]
    others = {"PYTHONPATH": str(root.resolve()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, env=os.environ | others, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The {way} training with the code in {root} failed:\n{done.stderr}")
    stacks: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    if missing := _WAYS[way].keys() - stacks.keys():
        raise RuntimeError(f"{root}, {way}: not seen: {', '.join(missing)}. Are these still the names: {names}?")
    return stacks


def _list_places(found: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{name}: {', '.join(places)}" for name, places in found.items()]


def _count_hops(stacks: dict[str, list[str]]) -> Row:
    """Calls and changes of module along the stacks, and the modules of all of them, in one sum."""
    total, parts, met = 0, [], set()
    for part, stack in stacks.items():
        modules = [place.partition(":")[0] for place in stack]
        calls, changes = len(stack) - 1, sum(one != other for one, other in pairwise(modules))
        met |= {*modules}
        total += calls + changes
        parts += [f"{part}: {calls} calls, {changes} changes of module", *(f"    {place}" for place in stack)]
    return Row(str(total + len(met)), [*parts, f"modules: {len(met)}"])


def _trace(way: str, names: Names) -> dict[str, list[str]]:
    """What `find_hops` returns, with the package that is imported here."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer

    from hf_slim import SlimTrainerCallback, SlimTrainingArguments, save_slimmed

    stacks: dict[str, list[str]] = {}

    def watch(frame: FrameType, event: str, function: Any) -> None:
        name = frame.f_code.co_name
        if event == "c_call" and getattr(function, "__name__", None) == "index_fill_":
            part = "zeros"
        elif event == "call" and name == names.slice:
            part = "slice"
        elif event == "call" and name == "__init__":
            part = "plan" if type(frame.f_locals.get("self")).__name__ in names.plan.split(",") else ""
        else:
            return
        stack = _find_stack(frame)
        begins = [n for n, place in enumerate(stack) if re.fullmatch(rf".*:{_WAYS[way].get(part, '')}", place)]
        if begins and (part != "slice" or any(place.endswith(f":{names.cut}") for place in stack)):
            stacks.setdefault(part, stack[begins[-1] :])
        elif part == "plan" and stack:
            early.append(stack)

    early: list[list[str]] = []  # plans that are made before the training
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    rows = [{"input_ids": torch.randint(5, 64, (8,)), "labels": torch.tensor(i % 2)} for i in range(16)]
    settings: dict[str, Any] = {"slim_start": 1, "slim_end": 3, "slim_frequency": 1, "slim_round_to": 8}
    still: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    sys.setprofile(watch)
    arguments = SlimTrainingArguments(
        "out", ffn2_sparsity=0.5, mha_sparsity=0.5, max_steps=6, slim_live=way == "live", **settings, **still
    )
    model = BertForSequenceClassification(config)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[SlimTrainerCallback()])
    trainer.train()
    if way == "masked":
        save_slimmed(trainer, "out/slim")
    sys.setprofile(None)
    stacks |= {} if "plan" in stacks or not early else {"plan": early[-1]}
    return {part: stacks[part] for part in _WAYS[way] if part in stacks}


def _find_stack(frame: FrameType | None) -> list[str]:
    """The functions of ours that are running, outermost first."""
    stack: list[str] = []
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if module.partition(".")[0] == PACKAGE and name not in _BRIEF:
            stack.insert(0, f"{module}:{name}")
        frame = frame.f_back
    return stack


def _print_table(tables: dict[str, dict[str, Row]]) -> None:
    """All figures, a column for each checkout, as Markdown."""
    columns = list(tables.values())
    lines = [["", *tables], *([title, *(column[title].value for column in columns)] for title in columns[0])]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, [f"{'-' * (width - bool(n))}{':' if n else ''}" for n, width in enumerate(widths)])
    for line in lines:
        cells = (c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Print the table, and with `--list` what its figures are made of; or draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", action="append", help="a checkout, also as TITLE=FOLDER; several give columns")
    parser.add_argument("--list", action="store_true", help="print what the figures are made of, too")
    parser.add_argument("--picture", type=Path, help="draw the rooms of the first checkout into this .svg or .png")
    parser.add_argument("--slice", default=Names().slice, help="the function that slices a weight")
    parser.add_argument("--cut", default=Names().cut, help="the function that slices all weights of a model")
    parser.add_argument("--plan", default=Names().plan, help="the classes of what is made of the settings")
    parser.add_argument("--trace", choices=_WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    roots = {}
    for root in options.root or [str(Path(__file__).parents[1])]:
        title, _, folder = root.rpartition("=")
        roots[title or Path(folder).resolve().name] = Path(folder)
    names = Names(options.slice, options.cut, options.plan)
    if options.trace:
        print(json.dumps(_trace(options.trace, names)))
    elif options.picture:
        draw_rooms(next(iter(roots.values())), options.picture)
    else:
        tables = {title: find_rows(root, names) for title, root in roots.items()}
        _print_table(tables)
        for title, rows in tables.items() if options.list else ():
            for name, row in rows.items():
                if row.parts:
                    print(f"\n{title}, {name}: {row.value}", *(f"  {part}" for part in row.parts), sep="\n")


if __name__ == "__main__":
    main()
