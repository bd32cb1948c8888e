"""The tokenizer of a GGUF file: the vocabulary and merges of a byte-level BPE, and the name of how it splits text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITTINGS = {_WORD + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORD + r"\p{N}" + _REST: "qwen2"}
"""What llama.cpp calls the expressions by which a tokenizer splits text into words."""
_NORMAL, _CONTROL, _OWN, _UNUSED = 1, 3, 4, 5
"""Kinds of tokens in GGUF."""
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer.

    Args:
        tokens: All tokens, by their ids; the bytes of each written as the letters that byte-level BPE has for them.
        kinds: The kind of each.
        merges: The merges, in their order, as two tokens with a space between them.
        splitting: What llama.cpp calls the way in which text is split into words.
        special: The ids of the special tokens, by what GGUF calls them.
        adds_begin: Whether every text begins with the first of them.
        chat_template: How a conversation is written; None if the tokenizer does not say.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    splitting: str
    special: dict[str, int]
    adds_begin: bool
    chat_template: str | None


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary | None:
    """Read what a GGUF file says of a tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers, or None.
        size: The number of tokens that the model has; those that the tokenizer does not have are written as unused.

    Returns:
        The vocabulary; None for no tokenizer.

    Raises:
        ValueError: If it is none that llama.cpp knows by what it is made of.
    """
    if tokenizer is None:
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    splitting = _find_splitting(parts)
    numbers = tokenizer.get_vocab()
    names = {number: token for token, number in numbers.items()}
    if max(names, default=0) >= size:
        raise ValueError(f"The tokenizer has {max(names) + 1} tokens, but the model only {size}.")
    added = {entry["id"]: _CONTROL if entry["special"] else _OWN for entry in parts["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    special = {name: getattr(tokenizer, field) for name, field in _SPECIAL.items()}
    begin = tokenizer("a")["input_ids"][:1]
    return Vocabulary(
        tokens=[names.get(number, f"[PAD{number}]") for number in range(size)],
        kinds=[added.get(number, _NORMAL if number in names else _UNUSED) for number in range(size)],
        merges=merges or [f"{names[0]}{names[0]} {names[0]}"],  # llama.cpp wants one; this one never happens
        splitting=splitting,
        special={name: number for name, number in special.items() if number is not None},
        adds_begin=tokenizer.bos_token_id is not None and begin == [tokenizer.bos_token_id],
        chat_template=getattr(tokenizer, "chat_template", None),
    )


def _find_splitting(parts: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which a tokenizer splits text into words."""
    model, before = parts["model"], parts["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if model.get("type") == "BPE" and byte_level and not model.get("byte_fallback"):
        if not model["merges"]:
            return "gpt-2"  # single bytes, whatever the words are
        if not patterns and byte_level[0].get("use_regex", True):
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in _SPLITTINGS:
            return _SPLITTINGS[patterns[0]]
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise ValueError(
        f"The tokenizer ({model.get('type')} after {kinds}) is none of those that can be written: byte-level BPE that "
        "splits text as GPT-2, Llama 3 or Qwen2 do. Export a copy of the folder without its tokenizer files for a "
        "file that takes token ids."
    )
