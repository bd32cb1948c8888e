"""The metrics of a task, by the modules that come with the package, so that nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
from transformers import EvalPrediction, Trainer

from .data import Task

_METRICS = {"classification": ("accuracy",), "regression": ("pearson", "spearman"), "causal-lm": ()}


def evaluate_task(trainer: Trainer, task: Task) -> dict[str, float]:
    """Evaluate a model on a trainer's evaluation data.

    Args:
        trainer: The trainer, with what `make_compute_metrics` gives.
        task: What the model does.

    Returns:
        The metrics of the task and the loss, by name; for a language model its perplexity, too.
    """
    found = trainer.evaluate()
    metrics = {name: found[f"eval_{name}"] for name in (*_METRICS[task], "loss")}
    if task == "causal-lm":
        metrics["perplexity"] = math.exp(metrics["loss"])
    return metrics


def make_compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]] | None:
    """Make what a trainer computes the metrics of a task by.

    Args:
        task: The task.

    Returns:
        The function; None for a task that has none beside the loss.
    """
    folder = Path(__file__).with_name("metrics")
    modules = [evaluate.load(str(folder / name), keep_in_memory=True) for name in _METRICS[task]]
    if not modules:
        return None

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        logits = evaluated.predictions[0] if isinstance(evaluated.predictions, tuple) else evaluated.predictions
        predictions = np.argmax(logits, axis=-1) if task == "classification" else np.squeeze(logits, axis=-1)
        results: dict[str, float] = {}
        for module in modules:
            results.update(module.compute(predictions=predictions, references=evaluated.label_ids))
        return results

    return compute_metrics
