"""The tokenizer of a run: a saved one, one from a vocabulary file, or single bytes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_END = "<|endoftext|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: A Hub name, a folder, or a WordPiece vocabulary, one piece a line, in a file that ends in `.txt`. A
            vocabulary with capitals is taken as cased.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If a vocabulary file lacks a special token of BERT.
    """
    if not name.endswith(".txt"):
        return AutoTokenizer.from_pretrained(name)
    pieces = Path(name).read_text(encoding="utf-8").splitlines()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    missing = [token for token in special if token not in pieces]
    if missing:
        raise ValueError(
            f"The vocabulary {name} lacks {', '.join(missing)}: a BERT vocabulary has one piece a line, among them "
            f"{', '.join(special)}."
        )
    cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    return BertTokenizer(vocab=name, do_lower_case=not cased)


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the 256 bytes and an end of text.

    Returns:
        The tokenizer, of 257 tokens; it encodes every text without loss.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, pad_token=_END)
