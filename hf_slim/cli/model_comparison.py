"""`hf-slim compare`: two models side by side: sizes, operations, latency, outputs, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import check_whole
from ..compaction import find_auto_classes
from ..costs import LENGTH, Skeleton, count_flops, without_bars
from ..proof import OutputDifference, Outputs, compute_outputs, describe, make_inputs, measure_differences
from ..saving import count_bytes, count_parameters, measure_latency, render_table, shorten
from ..structures import StructureGroup, find_structures, group_by_place
from .data import DataArguments
from .file_evaluation import FileData, evaluate_on_file, find_task, load_file_data
from .model_source import load_model
from .tokenizer import has_tokenizer, load_tokenizer

_ROWS = 8
"""Of a file, for the comparison of outputs."""
_MANY_TASKS = ("AutoModelForPreTraining", "AutoModelWithLMHead")
"""Auto classes of models that do not all do the same."""


@dataclass
class CompareArguments:
    """Which models are compared, and on what.

    Args:
        model: A Hub name, or a folder with weights.
        other: The model to compare it with.
        validation_file: Data to evaluate both on, as `DataArguments` takes it; without, outputs and latency are those
            of made inputs.
        text_column: As of `DataArguments`.
        label_column: As of `DataArguments`.
        tokenizer_name: A Hub name, a folder, or a WordPiece vocabulary (.txt), if not the model's.
        max_seq_length: As of `DataArguments`.
        batch_size: Rows of a forward pass of the evaluation.
    """

    model: str
    other: str
    validation_file: str | None = None
    text_column: list[str] | None = None
    label_column: str | None = None
    tokenizer_name: str | None = None
    max_seq_length: int = DataArguments.max_seq_length
    batch_size: int = 8


@dataclass(frozen=True)
class ComparedModel:
    """What was measured of one model.

    Args:
        model: Its Hub name or folder.
        architecture: Its class.
        parameters: Number of parameters.
        bytes: Bytes of the saved tensors.
        flops: Operations of a forward pass.
        latency_ms: Median milliseconds of a forward pass.
        structures: What can be slimmed in it, and how many units it has.
        metrics: The metrics of the task and the loss on the file, by name; empty without one.
    """

    model: str
    architecture: str
    parameters: int
    bytes: int
    flops: int
    latency_ms: float
    structures: tuple[StructureGroup, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class ModelComparison:
    """Two models side by side; prints as tables.

    Args:
        first: The one.
        second: The other.
        outputs: How far their outputs are apart.
        computed_on: What outputs, operations and latency are those of.
        device: Where they were computed.
    """

    first: ComparedModel
    second: ComparedModel
    outputs: tuple[OutputDifference, ...]
    computed_on: str
    device: str

    def __str__(self) -> str:
        """The figures, then the sizes of structures, then the outputs."""
        return "\n\n".join([self._render_figures(), self._render_structures(), self._render_outputs()])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def _render_figures(self) -> str:
        one, other = self.first, self.second
        rows: list[tuple[str, ...]] = [("", one.model, other.model, "change")]
        rows.append(("class", one.architecture, other.architecture, ""))
        rows.append(_row("parameters", one.parameters, other.parameters, "{:,}".format))
        rows.append(_row("megabytes", one.bytes / 1e6, other.bytes / 1e6, "{:,.1f}".format))
        rows.append(_row("FLOPs", one.flops, other.flops, shorten))
        rows.append(_row(f"latency (ms, {self.device})", one.latency_ms, other.latency_ms, "{:.2f}".format))
        rows += [(name, f"{value:.4f}", f"{other.metrics[name]:.4f}", "") for name, value in one.metrics.items()]
        return render_table(rows)

    def _render_structures(self) -> str:
        sizes: dict[tuple[str, str], list[str]] = {}
        for place, model in enumerate((self.first, self.second)):
            for group in model.structures:
                cells = sizes.setdefault((group.name, group.kind), ["", ""])
                cells[place] = f"{len(group.units)} x {group.range}"
        rows = [(name, kind, *cells) for (name, kind), cells in sizes.items()]
        return render_table([("structures", "", "units", "units"), *rows], left=2)

    def _render_outputs(self) -> str:
        rows = [("outputs", "largest difference", "of the largest output")]
        rows += [(d.name, f"{d.absolute:.3g}", f"{d.relative:.3g}") for d in self.outputs]
        return f"{render_table(rows)}\nOutputs, FLOPs and latency: a forward pass on {self.computed_on}"


def compare_models(arguments: CompareArguments) -> ModelComparison:
    """Compare two models that do the same task.

    Args:
        arguments: The models, and the file to evaluate them on.

    Returns:
        What was found.

    Raises:
        ValueError: If there is no such model or file, or the models do not compare; the message names what differs.
    """
    _check_flags(arguments)
    with without_bars():
        models = load_model(arguments.model), load_model(arguments.other)
    names = arguments.model, arguments.other
    _refuse_different(names, models)
    data = _load_data(arguments, models)
    inputs = make_inputs(models[0], LENGTH) if data is None else data.make_batch(_ROWS)
    outputs = [_run(name, model, inputs) for name, model in zip(names, models, strict=True)]
    differences = measure_differences(*outputs)
    if not differences:
        shapes = [", ".join(f"{name} {tuple(v.shape)}" for name, v in found.items()) for found in outputs]
        raise ValueError(f"{names[0]} and {names[1]} do not compare: their outputs are {shapes[0]} and {shapes[1]}.")
    latency = measure_latency({str(place): model for place, model in enumerate(models)}, inputs)
    found = []
    for place, (name, model) in enumerate(zip(names, models, strict=True)):
        structures = find_structures(model).structures
        found.append(
            ComparedModel(
                name,
                type(model).__name__,
                count_parameters(model),
                count_bytes(model),
                count_flops(Skeleton(model, structures, {}), [inputs], {})[""],
                latency[str(place)],
                group_by_place(structures),
                {} if data is None else evaluate_on_file(model, data, arguments.batch_size),
            )
        )
    return ModelComparison(found[0], found[1], differences, describe(inputs), "cpu")


def _check_flags(arguments: CompareArguments) -> None:
    """Refuse numbers out of range, and flags about the rows of a file where there is none."""
    check_whole("--batch_size", arguments.batch_size)
    if arguments.validation_file is not None:
        return
    for flag in fields(arguments):
        if flag.default is not MISSING and getattr(arguments, flag.name) != flag.default:
            raise ValueError(f"--{flag.name} is about the rows of a file: name one by --validation_file.")


def _refuse_different(names: tuple[str, str], models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Refuse models that do not do the same."""
    one, other = models
    if type(one) is not type(other) and not _find_tasks(one) & _find_tasks(other):
        raise ValueError(
            f"{names[0]} and {names[1]} do not compare: they do different tasks, the one is a {type(one).__name__}, "
            f"the other a {type(other).__name__}. Name two models of one task."
        )
    sizes = {"vocabularies (vocab_size)": [_find_vocabulary(model) for model in models]}
    if "Classification" in type(one).__name__:
        sizes["numbers of labels"] = [model.config.num_labels for model in models]
    for what, found in sizes.items():
        if found[0] != found[1]:
            raise ValueError(
                f"{names[0]} and {names[1]} do not compare: they have different {what}, {found[0]} and {found[1]}. "
                "Name two models that were made from the same one, or trained on the same data."
            )


def _find_tasks(model: PreTrainedModel) -> set[str]:
    """The Auto classes that build models of a class."""
    classes = find_auto_classes(model.config)
    return {auto for auto, name in classes.items() if name == type(model).__name__ and auto not in _MANY_TASKS}


def _find_vocabulary(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "vocab_size", None)


def _load_data(arguments: CompareArguments, models: tuple[PreTrainedModel, PreTrainedModel]) -> FileData | None:
    if arguments.validation_file is None:
        return None
    find_task(models[0])
    tokenizer = _load_tokenizer(arguments)
    data = DataArguments(
        train_file=arguments.validation_file,
        validation_file=arguments.validation_file,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        max_seq_length=arguments.max_seq_length,
    )
    return load_file_data(data, models[0], tokenizer)


def _load_tokenizer(arguments: CompareArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of both; one that is named, or the first model's, which the other's must be like."""
    if arguments.tokenizer_name is not None:
        return load_tokenizer(arguments.tokenizer_name)
    names = arguments.model, arguments.other
    found = [load_tokenizer(name) for name in names if has_tokenizer(name)]
    if not found:
        raise ValueError(f"There is no tokenizer in {' or '.join(names)}: name one by --tokenizer_name.")
    vocabularies = [tokenizer.get_vocab() for tokenizer in found]
    tokens = sorted(vocabularies[0], key=vocabularies[0].__getitem__)
    wrong = next((token for token in tokens if vocabularies[-1].get(token) != vocabularies[0][token]), None)
    if wrong is not None:
        raise ValueError(
            f"{names[0]} and {names[1]} do not compare: their tokenizers have different vocabularies, {wrong!r} is "
            f"{vocabularies[0][wrong]} and {vocabularies[-1].get(wrong)}. Name two models of one tokenizer."
        )
    return found[0]


def _run(name: str, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Outputs:
    try:
        return compute_outputs(model, inputs)
    except ValueError as error:
        reason = str(error.__cause__)
        raise ValueError(f"{name}, a {type(model).__name__}, does not run on {describe(inputs)}: {reason}") from error


def _row(name: str, one: float, other: float, spell: Callable[[float], str]) -> tuple[str, ...]:
    change = f"{100 * (other - one) / one:+.1f}%" if one else ""
    return name, spell(one), spell(other), change
