"""The tokenizer of a GGUF file: the vocabulary and merges of a byte-level BPE, and the name of how it splits text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

Parts = Mapping[str, Any]
"""What a file `tokenizer.json` holds."""
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITTINGS = {_WORD + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORD + r"\p{N}" + _REST: "qwen2"}
"""What llama.cpp calls the expressions by which a tokenizer splits text into words."""
_WITHOUT = "Export a copy of the folder without its tokenizer files for a file that takes token ids."
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
        adds_begin: Whether every text begins with the special token for that.
        adds_end: Whether every text ends with the special token for that.
        chat_template: How a conversation is written; None if the tokenizer does not say.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    splitting: str
    special: dict[str, int]
    adds_begin: bool
    adds_end: bool
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
    _check_text_is_kept(parts)
    adds_begin, adds_end = _find_added_tokens(tokenizer)
    numbers = tokenizer.get_vocab()
    names = {number: token for token, number in numbers.items()}
    if max(names, default=0) >= size:
        raise ValueError(f"The tokenizer has {max(names) + 1} tokens, but the model only {size}.")
    added = {entry["id"]: _CONTROL if entry["special"] else _OWN for entry in parts["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    special = {name: getattr(tokenizer, field) for name, field in _SPECIAL.items()}
    return Vocabulary(
        tokens=[names.get(number, f"[PAD{number}]") for number in range(size)],
        kinds=[added.get(number, _NORMAL if number in names else _UNUSED) for number in range(size)],
        merges=merges or [f"{names[0]}{names[0]} {names[0]}"],  # llama.cpp wants one; this one never happens
        splitting=splitting,
        special={name: number for name, number in special.items() if number is not None},
        adds_begin=adds_begin,
        adds_end=adds_end,
        chat_template=getattr(tokenizer, "chat_template", None),
    )


def _check_text_is_kept(parts: Parts) -> None:
    """Refuse a tokenizer that changes the text before it splits it, or its tokens, as llama.cpp would not."""
    model, found = parts["model"], None
    normalizer = (parts["normalizer"] or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        found = f"changes the text by {normalizer}"
    elif any(step.get("add_prefix_space") for step in _list_steps(parts)):
        found = "puts a space before the text (add_prefix_space)"
    elif model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        found = "marks the ends or the middles of words"
    if found:
        raise ValueError(f"The tokenizer {found}, which llama.cpp does not do. {_WITHOUT}")


def _find_added_tokens(tokenizer: Any) -> tuple[bool, bool]:
    """Whether texts begin and end with the special tokens for that; anything else that is added is refused."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for adds_begin, adds_end in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [begin] * adds_begin + plain + [end] * adds_end:
            return adds_begin, adds_end
    raise ValueError(
        f"The tokenizer makes {whole} of a text that is {plain}: llama.cpp can add a bos_token before it and an "
        f"eos_token after it, and nothing else. {_WITHOUT}"
    )


def _list_steps(parts: Parts) -> list[Mapping[str, Any]]:
    """The steps in which a tokenizer splits text into words."""
    before = parts["pre_tokenizer"] or {}
    return before.get("pretokenizers", [before])


def _find_splitting(parts: Parts) -> str:
    """What llama.cpp calls the way in which a tokenizer splits text into words."""
    model, steps = parts["model"], _list_steps(parts)
    kinds = [step.get("type") for step in steps]
    if model.get("type") == "BPE" and "ByteLevel" in kinds and not model.get("byte_fallback"):
        by_words = steps[-1].get("use_regex", True)
        if not model["merges"]:
            return "gpt-2"  # single bytes, whatever the words are
        if kinds == ["ByteLevel"] and by_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_words and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_words and _is_plain(steps[0]):
            return _SPLITTINGS[steps[0]["pattern"]["Regex"]]
    raise ValueError(
        f"The tokenizer ({model.get('type')} after {', '.join(map(str, kinds))}) is none of those that can be "
        f"written: byte-level BPE that splits text as GPT-2, Llama 3, Qwen2 or SmolLM do. {_WITHOUT}"
    )


def _is_plain(step: Mapping[str, Any]) -> bool:
    """Whether a step splits text by an expression that llama.cpp knows, and keeps all of it."""
    known = step["pattern"].get("Regex") in _SPLITTINGS
    return known and step["behavior"] == "Isolated" and not step["invert"]
