"""Rows as sequences of tokens: how long they may be, how they are cut, and how they are put into batches."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from .data import Task, TextData

_JOINED = 10_000


def find_collator(task: Task, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Find what makes a batch of the sequences of a task.

    Args:
        task: The task.
        tokenizer: The tokenizer, which has a token to pad with.

    Returns:
        The data collator.
    """
    return default_data_collator if task == "causal-lm" else DataCollatorWithPadding(tokenizer)


def check_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> int:
    """Refuse sequences that a model does not take.

    Args:
        config: The config of the model.
        tokenizer: Its tokenizer.
        max_seq_length: Tokens of a sequence.

    Returns:
        The tokens that the model takes at most.

    Raises:
        ValueError: If it takes fewer.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if max_seq_length > longest:
        raise ValueError(
            f"--max_seq_length {max_seq_length} is more than the model takes, {longest}: make it smaller, or choose "
            "another model or config."
        )
    return longest


def tokenize(data: TextData, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Tokenize rows as their task has it.

    Args:
        data: What the rows are of.
        rows: Its `train` or `validation`.
        tokenizer: The tokenizer.
        max_seq_length: Tokens from which a row is cut; for causal-lm, into which all text is cut.

    Returns:
        The model's inputs and `labels`.

    Raises:
        ValueError: If the text of a causal-lm is shorter than one sequence.
    """
    if data.task == "causal-lm":
        return tokenize_chunks(rows, tokenizer, max_seq_length, documents=data.documents)
    return tokenize_pairs(rows, tokenizer, max_seq_length)


def tokenize_pairs(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Dataset:
    """Tokenize the rows of a classification or regression.

    Args:
        rows: Columns `text`, `labels` and maybe `text_pair`.
        tokenizer: The tokenizer.
        max_seq_length: Tokens from which a row is cut.

    Returns:
        The model's inputs, of varying length, and `labels`.
    """

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_seq_length)

    texts = [name for name in rows.column_names if name != "labels"]
    return rows.map(tokenize, batched=True, remove_columns=texts, desc="Tokenizing")


def tokenize_chunks(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, *, documents: bool
) -> Dataset:
    """Tokenize text for a language model, join the rows and cut them into sequences of one length.

    Args:
        rows: Column `text`.
        tokenizer: The tokenizer.
        max_seq_length: Tokens of a sequence; what is left over at the end of every 10,000 rows is dropped.
        documents: Whether to end each row with the tokenizer's end-of-sequence token, if it has one.

    Returns:
        `input_ids`, `attention_mask` and `labels`.

    Raises:
        ValueError: If the text is shorter than one sequence.
    """
    end = [tokenizer.eos_token_id] if documents and tokenizer.eos_token_id is not None else []

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [row + end for row in ids["input_ids"]]}

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = [token for row in batch["input_ids"] for token in row]
        starts = range(0, len(tokens) - max_seq_length + 1, max_seq_length)
        chunks = [tokens[start : start + max_seq_length] for start in starts]
        return {
            "input_ids": chunks,
            "attention_mask": [[1] * max_seq_length for _ in chunks],
            "labels": [list(chunk) for chunk in chunks],
        }

    ids = rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")
    chunks = ids.map(join, batched=True, batch_size=_JOINED, desc=f"Joining into sequences of {max_seq_length}")
    if len(chunks) == 0:
        tokens = sum(len(row) for row in ids["input_ids"])
        raise ValueError(
            f"A text of {tokens} tokens is too short for one sequence of max_seq_length={max_seq_length}: add text, "
            "or make max_seq_length smaller."
        )
    return chunks
