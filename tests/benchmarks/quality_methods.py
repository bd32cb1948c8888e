"""The methods of the quality benchmark: what is done with a dense model in the steps that follow its training."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_tasks import DATA, Task
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import CosineSimilarityLoss
from transformers import Trainer, set_seed

from hf_slim import (
    SlimArgumentsMixin,
    SlimConfig,
    SlimTrainer,
    SlimTrainerMixin,
    SlimTrainingArguments,
    slim,
)


@dataclass
class PairArguments(SlimArgumentsMixin, SentenceTransformerTrainingArguments):
    """The arguments of a bi-encoder."""


class PairTrainer(SlimTrainerMixin, SentenceTransformerTrainer):
    """The trainer of a bi-encoder."""


@dataclass(frozen=True)
class Method:
    """What is done with a dense model.

    Args:
        name: What it is called in files and tables.
        title: The same for people.
        settings: Fields of the training arguments beside the two sparsities.
        teacher: `start` for the dense model as training begins, `dense` for the one that was trained on.
        part: Which part of the further steps it takes.
        is_one_shot: Whether units are removed before the training, from 512 rows.
        is_fresh: Whether it starts from fresh weights, and takes all steps.
    """

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    part: float = 1.0
    is_one_shot: bool = False
    is_fresh: bool = False


CLASSIC = {
    "slim_criterion": "snip_momentum",
    "slim_schedule": "exp",
    "slim_scope": "local",
    "slim_start": 0.08,
    "slim_end": 0.77,
}
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("dense", "dense, trained on"),
        Method("classic", "classic recipe", CLASSIC),
        Method(
            "published",
            "published recipe with its distillation",
            {
                **CLASSIC,
                "slim_distill_weight": 1.0,
                "slim_hidden_weight": 2.0,
                "slim_distill_from": "last_hidden",
                "weight_decay": 1e-7,
                "adam_beta2": 0.9,
            },
            teacher="start",
        ),
        Method("default", "defaults"),
        Method("teacher", "defaults with a dense teacher", teacher="dense"),
        Method("one_shot", "one shot", part=0.0, is_one_shot=True),
        Method("one_shot_tenth", "one shot and a tenth of the steps", part=0.1, is_one_shot=True),
        Method("one_shot_all", "one shot and all of the steps", is_one_shot=True),
        Method(
            "scratch",
            "slim model from scratch, all steps",
            {"slim_criterion": "magnitude", "slim_scope": "local", "slim_start": 1, "slim_schedule": "oneshot"},
            is_fresh=True,
        ),
    )
}


def train_dense(task: Task, folder: Path, seed: int) -> dict[str, float]:
    """Train a dense model from fresh weights, and keep it in a folder."""
    set_seed(seed)
    model = task.build()
    found = _train(task, model, {}, task.steps, task.rate, seed)
    model.save_pretrained(str(folder))
    return found


def run(
    task: Task,
    method: Method,
    sparsities: tuple[float, float],
    rate: float,
    seed: int,
    dense: Path,
    trained_on: Path | None,
) -> dict[str, float]:
    """Carry out a method, and evaluate what it gives.

    Args:
        task: The task.
        method: The method.
        sparsities: Of FFN2 columns and of heads; both 0 for the dense model.
        rate: The learning rate.
        seed: Of weights, where they are fresh, and of the order of rows.
        dense: Folder of the dense model.
        trained_on: Folder of that model after the further steps; written by the method `dense`.

    Returns:
        The loss on rows that were not trained on, the score that people know, parameters and seconds.
    """
    set_seed(seed)
    model = task.build() if method.is_fresh else _load(task, dense)
    settings = {"slim_round_to": 8, **method.settings}
    if method.is_one_shot:
        _slim(task, model, sparsities)
    elif method.name != "dense":
        settings |= {"ffn2_sparsity": sparsities[0], "mha_sparsity": sparsities[1]}
    steps = task.steps + task.further if method.is_fresh else round(method.part * task.further)
    teacher = {"start": dense, "dense": trained_on}.get(method.teacher or "")
    found = _train(task, model, settings, steps, rate, seed, teacher)
    if method.name == "dense" and trained_on is not None:
        model.save_pretrained(str(trained_on))
    return found


def _load(task: Task, folder: Path) -> Any:
    if not task.is_pair:
        return task.model.from_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


def _slim(task: Task, model: Any, sparsities: tuple[float, float]) -> None:
    rows, _ = task.load(DATA[0])
    config = SlimConfig(ffn2_sparsity=sparsities[0], mha_sparsity=sparsities[1], slim_round_to=8)
    if task.is_pair:
        collate = task.collate(DATA[0])
        tokenizer = collate.tokenizer
        rows = [tokenizer(text, truncation=True, max_length=24) for text in rows[:512]["sentence1"]]
        slim(model[0].auto_model, rows, config, data_collator=collate)
    else:
        slim(model, rows, config, data_collator=task.collate(DATA[0]))


def _train(
    task: Task,
    model: Any,
    settings: Mapping[str, Any],
    steps: int,
    rate: float,
    seed: int,
    teacher: Path | None = None,
) -> dict[str, float]:
    """Train for some steps, none at all perhaps, and evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": max(1, steps),
            "learning_rate": rate,
            "seed": seed,
            "per_device_train_batch_size": task.batch,
            "per_device_eval_batch_size": 100,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.05,
            "weight_decay": 0.01,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 100,
            "disable_tqdm": True,
            **settings,
        }
        trainer = _make_trainer(task, model, arguments, _load(task, teacher) if teacher is not None else None)
        began = time.perf_counter()
        if steps:
            trainer.train()
        seconds = time.perf_counter() - began
        loss, score = _evaluate_pairs(task, model) if task.is_pair else _evaluate(task, trainer)
    return {
        "loss": loss,
        "score": score,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
    }


def _make_trainer(task: Task, model: Any, arguments: dict[str, Any], teacher: Any) -> Trainer:
    train, dev = task.load(DATA[0])
    keywords = {"teacher_model": teacher} if teacher is not None else {}
    if not task.is_pair:
        collate = task.collate(DATA[0])
        own = SlimTrainingArguments(**arguments)
        return SlimTrainer(model, own, train_dataset=train, eval_dataset=dev, data_collator=collate, **keywords)
    loss = CosineSimilarityLoss(model)
    return PairTrainer(model=model, args=PairArguments(**arguments), train_dataset=train, loss=loss, **keywords)


def _evaluate(task: Task, trainer: Trainer) -> tuple[float, float]:
    found = trainer.predict(trainer.eval_dataset)
    loss = found.metrics["test_loss"]
    if task.score is None:
        return loss, math.exp(loss)
    return loss, task.score[1](found.predictions, found.label_ids)


def _evaluate_pairs(task: Task, model: Any) -> tuple[float, float]:
    _, dev = task.load(DATA[0])
    model.eval()
    first, second = (model.encode(dev[name], show_progress_bar=False) for name in ("sentence1", "sentence2"))
    alike = torch.cosine_similarity(torch.tensor(first), torch.tensor(second)).numpy()
    labels = np.array(dev["score"])
    return float(((alike - labels) ** 2).mean()), float(np.corrcoef(alike, labels)[0, 1])
