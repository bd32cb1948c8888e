"""A file that trained models are evaluated on: its rows as their tokenizer and their labels have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from .data import DataArguments, Task, TextData, load_text_data
from .sequences import check_length, find_collator, tokenize
from .task_metrics import evaluate_task, make_compute_metrics
from .tokenizer import fit_tokenizer


@dataclass(frozen=True)
class FileData:
    """The rows of a file as a model takes them.

    Args:
        task: What the model does.
        rows: The model's inputs and `labels`.
        tokenizer: The tokenizer.
    """

    task: Task
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase

    @property
    def collator(self) -> Any:
        """What makes a batch of rows."""
        return find_collator(self.task, self.tokenizer)

    def make_batch(self, size: int) -> dict[str, torch.Tensor]:
        """The first rows, without labels.

        Args:
            size: How many.

        Returns:
            Keyword arguments for a forward pass.
        """
        batch = dict(self.collator([self.rows[place] for place in range(min(size, len(self.rows)))]))
        batch.pop("labels")
        return batch


def load_file_data(arguments: DataArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FileData:
    """Load all rows of a file for a trained model.

    Args:
        arguments: The file, as training and as validation data, its columns and the longest sequence.
        model: The model; classes of the file are those of its config.
        tokenizer: Its tokenizer.

    Returns:
        The rows.

    Raises:
        ValueError: If the model does no task that has metrics, or a file, a column or a label does not fit.
    """
    arguments.task = find_task(model)
    name = model.config.name_or_path
    fit_tokenizer(tokenizer, model.config, tokenizer.name_or_path or name, name, pads=arguments.task != "causal-lm")
    check_length(model.config, tokenizer, arguments.max_seq_length)
    data = load_text_data(arguments)
    rows = tokenize(data, _number_labels(data, model.config), tokenizer, arguments.max_seq_length)
    return FileData(data.task, rows, tokenizer)


def evaluate_on_file(model: PreTrainedModel, data: FileData, batch_size: int) -> dict[str, float]:
    """Evaluate a model.

    Args:
        model: The model; it is moved to where a trainer computes.
        data: The rows.
        batch_size: Rows of a forward pass.

    Returns:
        The metrics of the task and the loss, by name.
    """
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(folder, per_device_eval_batch_size=batch_size, report_to="none", disable_tqdm=True),
            eval_dataset=data.rows,
            processing_class=data.tokenizer,
            data_collator=data.collator,
            compute_metrics=make_compute_metrics(data.task),
        )
        trainer.remove_callback(PrinterCallback)
        return evaluate_task(trainer, data.task)


def find_task(model: PreTrainedModel) -> Task:
    """What a model does, by its class.

    Args:
        model: The model.

    Returns:
        The task.

    Raises:
        ValueError: If it does none that has metrics.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "regression" if model.config.num_labels == 1 else "classification"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    raise ValueError(
        f"There are metrics for sequence classification, regression and causal language models, and none for "
        f"{name}: leave out --validation_file."
    )


def _number_labels(data: TextData, config: PreTrainedConfig) -> Dataset:
    """The rows with the numbers that the model has for their classes; a regression as it is."""
    if data.task != "classification":
        return data.validation
    numbers = [_find_number(name, config, data.classes) for name in data.classes]
    labels = [numbers[label] for label in data.validation["labels"]]
    return data.validation.remove_columns("labels").add_column("labels", labels)


def _find_number(name: str, config: PreTrainedConfig, classes: Sequence[str]) -> int:
    known: Any = config.label2id
    if name in known:
        return known[name]
    if name.isdecimal() and int(name) < config.num_labels and not any(label.isdecimal() for label in known):
        return int(name)
    raise ValueError(
        f"The label {name!r} of the file is none of the model, which has {', '.join(map(str, known))}: name the "
        "--label_column that it was trained on, or a file with its labels."
    )
