"""The six tasks of the quality benchmark: data, models of every shape, and how well a model does."""

from __future__ import annotations

import copy
import csv
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, models
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

HIDDEN, LAYERS, HEADS, CHANNELS = 64, 4, 8, 256
BYTES = 64
"""Bytes in a row of text."""


@dataclass(frozen=True)
class Task:
    """What a model learns.

    Args:
        name: What it is called in files and tables.
        title: Data and model, for people.
        config: Of the dense model.
        model: Its class.
        load: Gives the rows to train and to evaluate on.
        collate: Puts rows together.
        rate: Learning rate at which the dense model is trained from scratch.
        steps: Optimizer steps of that.
        further: Optimizer steps after it, the same number for every method.
        batch: Rows in a batch.
        score: What a number is called that people know, and how it comes from predictions and labels; None for text,
            where it is the perplexity.
        is_pair: Whether it is a bi-encoder of sentence-transformers.
    """

    name: str
    title: str
    config: Any
    model: Any
    load: Callable[[Path], tuple[Any, Any]]
    collate: Callable[[Path], Callable[[list[Any]], dict[str, Any]]]
    rate: float
    steps: int
    further: int
    batch: int
    score: tuple[str, Callable[[np.ndarray, np.ndarray], float]] | None = None
    is_pair: bool = False

    def build(self, config: Any = None) -> Any:
        """A model with fresh weights, from this task's config or from that of a slim model."""
        model = self.model(copy.deepcopy(self.config if config is None else config))
        return to_sentence_transformer(model) if self.is_pair else model


def read_bytes(data: Path) -> tuple[Dataset, Dataset]:
    """Tiny Shakespeare as rows of bytes: the first nine tenths to train on, of the last one 512 rows."""
    text = np.frombuffer((data / "tinyshakespeare" / "input.txt").read_bytes(), dtype=np.uint8).astype(np.int64)
    rows = text[: len(text) // BYTES * BYTES].reshape(-1, BYTES)
    cut = len(rows) * 9 // 10
    parts = (rows[:cut], rows[cut:][:: (len(rows) - cut) // 512][:512])
    return tuple(Dataset.from_dict({"input_ids": part, "labels": part}) for part in parts)  # type: ignore[return-value]


@functools.lru_cache
def read_tokenizer(data: Path) -> BertTokenizer:
    """BERT's tokenizer."""
    return BertTokenizer(vocab=str(data / "bert-vocab" / "vocab.txt"), model_max_length=64)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_questions(data: Path) -> tuple[Dataset, Dataset]:
    """TREC: questions and the six types of their answers."""

    def encode(rows: list[dict[str, str]]) -> Dataset:
        encoded = read_tokenizer(data)([row["text"] for row in rows], truncation=True, max_length=24)
        return Dataset.from_dict({**encoded, "labels": [int(row["label"]) for row in rows]})

    return encode(read_rows(data / "trec" / "train.csv")), encode(read_rows(data / "trec" / "test.csv"))


def read_pairs(data: Path) -> tuple[Dataset, Dataset]:
    """The STS benchmark: two sentences, and how alike they are, from 0 to 1."""

    def encode(rows: list[dict[str, str]]) -> Dataset:
        first, second = ([row[name] for row in rows] for name in ("sentence1", "sentence2"))
        encoded = read_tokenizer(data)(first, second, truncation=True, max_length=48)
        return Dataset.from_dict({**encoded, "labels": [float(row["score"]) / 5 for row in rows]})

    return encode(read_rows(data / "stsb" / "train.csv")), encode(read_rows(data / "stsb" / "dev.csv"))


def read_sentences(data: Path) -> tuple[Dataset, Dataset]:
    """The STS benchmark for a bi-encoder, as sentence-transformers takes it."""

    def take(rows: list[dict[str, str]]) -> Dataset:
        columns = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
        return Dataset.from_dict({**columns, "score": [float(row["score"]) / 5 for row in rows]})

    return take(read_rows(data / "stsb" / "train.csv")), take(read_rows(data / "stsb" / "dev.csv"))


def read_digits(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The digits of scikit-learn: 8 x 8 pixels; every fifth is evaluated on."""
    digits = load_digits()
    rows = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32)[None] / 8 - 1, "labels": int(label)}
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    return [row for n, row in enumerate(rows) if n % 5], rows[::5]


def to_sentence_transformer(model: Any) -> Any:
    """A bi-encoder of a BERT: the mean of its token embeddings."""
    tokenizer = read_tokenizer(DATA[0])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        word = models.Transformer(folder, max_seq_length=24)
    return SentenceTransformer(modules=[word, models.Pooling(HIDDEN)], device="cpu")


DATA: list[Path] = []
"""The folder of the data, once it is known."""


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of labels that are predicted."""
    return float((predictions.argmax(-1) == labels).mean())


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation."""
    return float(np.corrcoef(predictions.flatten(), labels)[0, 1])


def pad(data: Path) -> Any:
    """The collator of tokenized text."""
    return DataCollatorWithPadding(read_tokenizer(data))


BERT = BertConfig(
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=CHANNELS,
    max_position_embeddings=64,
)


def bert(**changes: Any) -> BertConfig:
    """The BERT of all tasks with a head."""
    return BertConfig(**{**BERT.to_diff_dict(), **changes})


BERT_TASK = functools.partial(Task, collate=pad, rate=1e-3, steps=1000)
SHAKESPEARE = functools.partial(
    Task, load=read_bytes, collate=lambda data: default_data_collator, rate=4e-3, steps=2000, further=300, batch=16
)

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        SHAKESPEARE(
            "gpt2",
            "Tiny Shakespeare, GPT-2",
            GPT2Config(
                vocab_size=128,
                n_embd=HIDDEN,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=BYTES,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            ),
            GPT2LMHeadModel,
        ),
        SHAKESPEARE(
            "llama",
            "Tiny Shakespeare, Llama with 16 query heads on 8 key-value heads",
            LlamaConfig(
                vocab_size=128,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=2 * HEADS,
                num_key_value_heads=HEADS,
                head_dim=8,
                intermediate_size=CHANNELS * 3 // 4,
                max_position_embeddings=BYTES,
                initializer_range=0.05,
                bos_token_id=0,
                eos_token_id=0,
            ),
            LlamaForCausalLM,
        ),
        BERT_TASK(
            "trec",
            "TREC questions, BERT",
            bert(num_labels=6),
            BertForSequenceClassification,
            read_questions,
            further=340,
            batch=32,
            score=("accuracy", accuracy),
        ),
        BERT_TASK(
            "stsb",
            "STS benchmark, BERT",
            bert(num_labels=1, problem_type="regression"),
            BertForSequenceClassification,
            read_pairs,
            further=360,
            batch=16,
            score=("pearson", pearson),
        ),
        BERT_TASK(
            "biencoder",
            "STS benchmark, BERT as a bi-encoder",
            bert(),
            BertModel,
            read_sentences,
            further=360,
            batch=16,
            score=("pearson", pearson),
            is_pair=True,
        ),
        Task(
            "digits",
            "Digits, ViT",
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=CHANNELS,
                num_labels=10,
            ),
            ViTForImageClassification,
            read_digits,
            lambda data: default_data_collator,
            rate=1e-3,
            steps=1500,
            further=300,
            batch=32,
            score=("accuracy", accuracy),
        ),
    )
}
