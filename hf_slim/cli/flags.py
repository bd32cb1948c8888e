"""The flags of a subcommand, as fields of dataclasses: read, refused with the nearest known one, and explained."""

from __future__ import annotations

import difflib
import json
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

Kinds = Mapping[str, type]
"""Dataclasses whose fields are flags, by what their flags are about."""

_WIDTH, _LINES, _NAME = 100, 50, 28
_TRAINERS = frozenset(field.name for field in fields(TrainingArguments))
_MOST_USED = (
    *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "save_strategy"),
    *("resume_from_checkpoint", "bf16", "report_to", "push_to_hub", "hub_model_id", "seed"),
)


class _Parser(HfArgumentParser):
    """The parser of transformers, which leaves the program to its caller."""

    def error(self, message: str) -> NoReturn:
        """Refuse the flags."""
        raise ValueError(message)


class _GivenParser(_Parser):
    """One that gives only what was given: the dataclasses have the defaults."""

    def add_argument(self, *names: Any, **settings: Any) -> Action:
        """Add a flag that can be left out."""
        return super().add_argument(*names, **(settings | {"required": False, "default": SUPPRESS}))


def parse_flags(flags: Sequence[str], kinds: Kinds, defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """Read flags, or a .json file of them and then flags, which win over the file.

    Args:
        flags: The words after the subcommand.
        kinds: What they are fields of.
        defaults: Values of flags that are not given, in place of the fields' own.

    Returns:
        An instance of each of the dataclasses.

    Raises:
        ValueError: If a flag or a key is unknown (the message names the nearest one), is missing, or has a bad value.
    """
    values = dict(defaults or {}) | read_flags(flags, kinds)
    path = _find_file(flags)
    needed = [field.name for kind in kinds.values() for field in _list_fields(kind) if _is_needed(field)]
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}." if path else f"--{' and --'.join(missing)} must be given."
        )
    try:
        return _Parser(kinds.values(), add_help=False).parse_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}" if len(flags) == 1 and path else str(error)) from error


def read_flags(flags: Sequence[str], kinds: Kinds) -> dict[str, Any]:
    """Read the values that flags, and the .json file before them, give.

    Args:
        flags: The words after the subcommand.
        kinds: What they are fields of.

    Returns:
        The values of the flags that are given, by name.

    Raises:
        ValueError: As for `parse_flags`, but for what is missing.
    """
    parser = _GivenParser(kinds.values(), add_help=False)
    path = _find_file(flags)
    values = {} if path is None else _read_file(path, parser, kinds)
    given, unknown = parser.parse_known_args(flags if path is None else flags[1:])
    _refuse_unknown(unknown, kinds)
    return values | vars(given)


def describe_flags(prog: str, does: str, kinds: Kinds) -> str:
    """What `--help` prints, on one screen: our flags, and where the others are.

    Args:
        prog: The command, such as `hf-slim run`.
        does: What it does.
        kinds: What its flags are fields of.

    Returns:
        The text, at most 50 lines of 100 columns.
    """
    ours = {name: [_describe(field, kind) for field in _list_fields(kind, ours=True)] for name, kind in kinds.items()}
    first = [
        f"Usage: {prog} FLAGS, or {prog} FILE.json FLAGS: a file of flags, and those that differ",
        *textwrap.wrap(does, _WIDTH),
    ]
    last = []
    if any(issubclass(kind, TrainingArguments) for kind in kinds.values()):
        names = ", ".join(f"--{name}" for name in _MOST_USED)
        most = f"Training: {len(_TRAINERS)} flags of the Trainer; most used: {names}."
        last = textwrap.wrap(most, _WIDTH, subsequent_indent="  ")
    last += ["Output:", *_in_columns(_Entry("--json", "Print one JSON object for programs, and nothing else"))]
    last += _in_columns(_Entry("--help-all", "Explain every flag to its end"))
    _make_fit([entry for group in ours.values() for entry in group], _LINES - len(first) - len(last) - len(ours))
    groups = [[f"{title}:", *(line for e in group for line in _in_columns(e))] for title, group in ours.items()]
    return "\n".join([*first, *(line for group in groups for line in group), *last])


def describe_all_flags(prog: str, does: str, kinds: Kinds) -> str:
    """What `--help-all` prints: every flag, the Trainer's too, with its whole help, choices and default.

    Args:
        prog: The command, such as `hf-slim run`.
        does: What it does.
        kinds: What its flags are fields of.

    Returns:
        The text.
    """
    parser = _Parser(kinds.values(), prog=prog, description=does, add_help=False, usage=f"{prog} FLAGS")
    return parser.format_help()


def _find_file(flags: Sequence[str]) -> Path | None:
    """The file that holds flags; it comes before all others."""
    return Path(flags[0]) if flags and flags[0].endswith(".json") else None


def _read_file(path: Path, parser: HfArgumentParser, kinds: Kinds) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object whose keys are flags, got a {type(content).__name__}.")
    names = {key: key.replace("-", "_") for key in content}
    known = {field.name: field for kind in kinds.values() for field in _list_fields(kind)}
    _refuse_unknown([f"--{key}" for key, name in names.items() if name not in known], kinds)
    twice = [key for key, name in names.items() if key != name and name in content]
    if twice:
        raise ValueError(f"{path} has both {twice[0]} and {names[twice[0]]}: leave one out.")
    return {name: _read_value(path, known[name], content[key], parser) for key, name in names.items()}


def _read_value(path: Path, field: Field[Any], value: Any, parser: HfArgumentParser) -> Any:
    """What a file says, read as the same words after the flag."""
    if value is None:
        if field.default is None or field.name in _TRAINERS:
            return None
        raise ValueError(f"{path}: {field.name} is null; leave it out, or give a value.")
    if isinstance(value, list):
        words = [f"--{field.name}", *map(str, value)]
    else:
        words = [f"--{field.name}={json.dumps(value) if isinstance(value, dict) else value}"]
    try:
        given, unknown = parser.parse_known_args(words)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if unknown:
        raise ValueError(f"{path}: {field.name} takes one value, got {value}.")
    found = getattr(given, field.name)
    return value if found == value else found


def _refuse_unknown(unknown: Sequence[str], kinds: Kinds) -> None:
    """Refuse the first of some words that the parser does not know."""
    if not unknown:
        return
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        hint = "; a file of flags comes before all flags" if unknown[0].endswith(".json") else ""
        raise ValueError(f"{unknown[0]!r} is no flag, nor the value of one{hint}.")
    name = flag[2:].partition("=")[0].replace("-", "_")
    nearest = difflib.get_close_matches(name, _find_names(kinds), 1, cutoff=0.5)
    hint = f": did you mean --{nearest[0]}?" if nearest else "; --help-all lists them."
    raise ValueError(f"There is no flag {flag}{hint}")


def _find_names(kinds: Kinds) -> list[str]:
    """The names of all flags, ours first, so that they win where others are as near."""
    return [f.name for ours in (True, False) for kind in kinds.values() for f in _list_fields(kind, ours=ours)]


def _list_fields(kind: type, *, ours: bool | None = None) -> list[Field[Any]]:
    """The fields that are flags: all, or only ours, or only those of the Trainer."""
    theirs = _TRAINERS if issubclass(kind, TrainingArguments) else frozenset()
    return [field for field in fields(kind) if field.init and ours in (None, field.name not in theirs)]


def _is_needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _find_choices(hint: Any) -> Iterator[Any]:
    """What a `Literal` allows, alone or beside None."""
    for argument in get_args(hint):
        if isinstance(argument, (str, bool)):
            yield argument
        else:
            yield from _find_choices(argument)


@dataclass
class _Entry:
    """A flag with its default, its help, and its choices."""

    name: str
    text: str
    choices: tuple[str, ...] = ()


def _describe(field: Field[Any], kind: type) -> _Entry:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    value = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    name = f"--{field.name}{'' if default is None else ' (needed)' if default is MISSING else f' {value}'}"
    text = field.metadata["help"].rstrip(".")
    choices = tuple(str(choice) for choice in _find_choices(get_type_hints(kind)[field.name]))
    return _Entry(name if len(name) < _NAME - 2 else f"--{field.name}", text, choices)


def _make_fit(entries: Sequence[_Entry], room: int) -> None:
    """Shorten the longest helps by their last clauses until all take no more than so many lines."""
    while sum(len(_in_columns(entry)) for entry in entries) > room:
        shorter = {e.name: _without_last_clause(e.text) for e in entries}
        cuttable = [e for e in reversed(entries) if len(_in_columns(e)) > 1 and shorter[e.name] != e.text]
        if not cuttable:
            return
        longest = max(cuttable, key=lambda entry: len(_in_columns(entry)))
        longest.text = shorter[longest.name]


def _without_last_clause(text: str) -> str:
    """A text up to its last full stop, or else semicolon, colon or comma, outside of brackets."""
    inside = [text[:end].count("(") + text[:end].count("[") for end in range(len(text))]
    outside = [text[:end].count(")") + text[:end].count("]") for end in range(len(text))]
    for mark in (". ", "; ", ": ", ", "):
        ends = [end for end in range(len(text)) if text.startswith(mark, end) and inside[end] == outside[end]]
        if ends:
            return text[: ends[-1]]
    return text


def _in_columns(entry: _Entry) -> list[str]:
    first = f"  {entry.name}".ljust(_NAME - 1) + " "
    is_listed = all(choice in entry.text for choice in entry.choices)
    text = f"{entry.text}." if is_listed else f"{entry.text} ({', '.join(entry.choices)})."
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * _NAME)
