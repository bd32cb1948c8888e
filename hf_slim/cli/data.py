"""The files of a run as rows: columns of fixed names, the task, and every row checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

Task = Literal["classification", "regression", "causal-lm"]

_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
_HELD_OUT = 0.1


@dataclass
class DataArguments:
    """What a run trains and evaluates on."""

    train_file: str = field(
        metadata={"help": "Training data: .csv (with a header), .json or .jsonl (an object a line), or .txt."}
    )
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Data to evaluate on. Default: a tenth of the training data, held out; for causal-lm the last, "
            "else a random one."
        },
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column of the text, or the two columns of sentence pairs. "
            "Default: the columns of text that are there."
        },
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the label. Default: 'label', if there is one."}
    )
    task: Task | None = field(
        default=None,
        metadata={
            "help": "What is learned. Default: regression if the labels are floating-point numbers, classification "
            "if they are anything else, causal-lm if there are none."
        },
    )
    max_seq_length: int = field(
        default=128,
        metadata={"help": "Tokens of a sequence: longer ones are cut; for causal-lm all are exactly this long."},
    )

    def __post_init__(self) -> None:
        """Take one column's name, as a file of arguments may give it, for a list of one."""
        if isinstance(self.text_column, str):
            self.text_column = [self.text_column]


@dataclass(frozen=True)
class TextData:
    """The rows of a run, checked, with columns of fixed names.

    Args:
        task: What is learned.
        train: Rows with `text`, for sentence pairs `text_pair`, and but for causal-lm `labels`: class ids or floats.
        validation: Likewise.
        classes: Names of the classes, by id; empty unless the task is classification.
        documents: Whether each row is a whole document, and not a line of one.
    """

    task: Task
    train: Dataset
    validation: Dataset
    classes: tuple[str, ...]
    documents: bool


def load_text_data(arguments: DataArguments, *, seed: int = 42) -> TextData:
    """Read the files, find the columns and the task, and check every row.

    Args:
        arguments: The files and columns.
        seed: Decides which rows are held out where there is no validation file.

    Returns:
        The rows.

    Raises:
        ValueError: If a file, a column or a value is missing or cannot be what it is said to be.
    """
    if arguments.max_seq_length < 2:
        raise ValueError(f"max_seq_length must be at least 2, got {arguments.max_seq_length}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 and below 2**32, got {seed}.")
    files = [path for path in (arguments.train_file, arguments.validation_file) if path is not None]
    for path in files:
        _check_file(path)
    rows = {path: _read(path) for path in files}
    texts, label, task = _find_columns(arguments, rows[arguments.train_file])
    for path in files:
        _check_rows(path, rows[path], texts, label)
    known: list[Any] = []
    if label and task == "classification":
        known = sorted({_to_class(value) for value in rows[arguments.train_file][label]})
    splits = [_rename(path, rows[path], texts, label, task, known) for path in files]
    if len(splits) == 1:
        if len(splits[0]) < 2:
            raise ValueError(f"{files[0]} has {len(splits[0])} row: name a --validation_file, or add rows.")
        parts = splits[0].train_test_split(_HELD_OUT, shuffle=task != "causal-lm", seed=seed)
        splits = [parts["train"], parts["test"]]
    documents = Path(arguments.train_file).suffix != ".txt"
    return TextData(task, splits[0], splits[1], tuple(str(name) for name in known), documents)


def _check_file(path: str) -> None:
    if Path(path).suffix not in _BUILDERS:
        raise ValueError(
            f"{path}: data must be one of {', '.join(_BUILDERS)}, got {Path(path).suffix or 'no ending'}."
        )
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")


def _read(path: str) -> Dataset:
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path} is empty.")
    builder = _BUILDERS[Path(path).suffix]
    # Of a csv only the empty cell is missing; "None" and "NA" are words. A text keeps its line ends.
    options: dict[str, dict[str, Any]] = {
        "csv": {"keep_default_na": False, "na_values": [""]},
        "text": {"keep_linebreaks": True},
    }
    try:
        return load_dataset(builder, data_files=path, split="train", **options.get(builder, {}))
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} has no rows, or is no {builder}: {error.__cause__ or error}") from error


def _find_columns(arguments: DataArguments, rows: Dataset) -> tuple[list[str], str | None, Task]:
    path, columns = arguments.train_file, rows.column_names
    label = arguments.label_column
    if label is None and "label" in columns and arguments.task != "causal-lm":
        label = "label"
    for name in [*(arguments.text_column or []), *([label] if label else [])]:
        _check_column(path, columns, name)
    task: Task = arguments.task or _infer_task(rows, label)
    if task == "causal-lm" and label is not None:
        raise ValueError(f"causal-lm has no labels: leave out --label_column {label}, or choose another --task.")
    if task != "causal-lm" and label is None:
        raise ValueError(f"{task} needs labels: name the --label_column, one of {', '.join(columns)} of {path}.")
    texts = arguments.text_column or [name for name in columns if name != label and _holds(rows, name, "string")]
    most = 1 if task == "causal-lm" else 2
    if not 1 <= len(texts) <= most:
        found = f"{len(texts)} ({', '.join(texts)})" if texts else "none"
        raise ValueError(
            f"{task} takes {'one text column' if most == 1 else 'one or two text columns'}; {path} has {found}. Name "
            f"the --text_column{' (and for a task with labels the --label_column)' if label is None else ''}, of "
            f"{', '.join(columns)}."
        )
    if label in texts:
        raise ValueError(f"{label!r} is both --text_column and --label_column: name two columns of {path}.")
    return texts, label, task


def _infer_task(rows: Dataset, label: str | None) -> Task:
    if label is None:
        return "causal-lm"
    return "regression" if _holds(rows, label, "float") else "classification"


def _holds(rows: Dataset, column: str, kind: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and kind in feature.dtype


def _check_column(path: str, columns: Sequence[str], name: str) -> None:
    if name not in columns:
        raise ValueError(f"{path} has no column {name!r}; it has {', '.join(columns)}.")


def _check_rows(path: str, rows: Dataset, texts: list[str], label: str | None) -> None:
    for name in [*texts, *([label] if label else [])]:
        _check_column(path, rows.column_names, name)
        missing = [number for number, value in enumerate(rows[name]) if value is None]
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of {len(rows)} rows have nothing in column {name!r}, the first is row "
                f"{missing[0] + 1} of the data. Fill them in or remove them."
            )
        if name != label and not _holds(rows, name, "string"):
            raise ValueError(f"Column {name!r} of {path} holds {_kind(rows, name)}, not text.")
        if name == label and not isinstance(rows.features[name], Value):
            raise ValueError(f"Column {name!r} of {path} holds {_kind(rows, name)}, not one label a row.")


def _kind(rows: Dataset, column: str) -> str:
    return getattr(rows.features[column], "dtype", None) or type(rows.features[column]).__name__


def _rename(path: str, rows: Dataset, texts: list[str], label: str | None, task: Task, known: list[Any]) -> Dataset:
    """The same rows with columns of fixed names, labels as class ids or floats."""
    columns: dict[str, list[Any]] = dict(
        zip(("text", "text_pair"), (list(rows[name]) for name in texts), strict=False)
    )
    if label is not None and task == "regression":
        columns["labels"] = [_to_float(path, label, value) for value in rows[label]]
    elif label is not None:
        ids = {value: number for number, value in enumerate(known)}
        values = [_to_class(value) for value in rows[label]]
        unknown = sorted({str(value) for value in values if value not in ids})
        if unknown:
            raise ValueError(
                f"{path}: the labels {', '.join(unknown)} of column {label!r} do not occur in the training data, "
                f"which has {', '.join(str(value) for value in known)}."
            )
        columns["labels"] = [ids[value] for value in values]
    return Dataset.from_dict(columns)


def _to_class(value: Any) -> Any:
    """A class as the key it is known by: 1.0 is the class 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _to_float(path: str, column: str, value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{path}: {value!r} in column {column!r} is not a finite number, which a regression needs.")
    return number
