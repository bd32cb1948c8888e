"""The tokenizer of a run: a saved one, one from a vocabulary file, or single bytes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..proof import RUN_ERRORS

_END = "<|endoftext|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: A Hub name, a folder, or a WordPiece vocabulary, one piece a line, in a file that ends in `.txt`. A
            vocabulary with capitals is taken as cased.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is none, or a vocabulary file lacks a special token of BERT; the message is one line.
    """
    if not name.endswith(".txt"):
        return _load_saved(name)
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


def has_tokenizer(name: str) -> bool:
    """Whether a tokenizer was saved in a folder.

    Args:
        name: A folder, or a Hub name, which may have one.

    Returns:
        False for a folder without, and for a file.
    """
    return not Path(name).exists() or (Path(name) / "tokenizer_config.json").is_file()


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, named: str, model: str, *, pads: bool
) -> None:
    """Give a tokenizer a token to pad with, and refuse one that does not belong to a model with weights.

    Args:
        tokenizer: The tokenizer.
        config: The config of the model.
        named: Where the tokenizer comes from, for the message.
        model: Where the model comes from, for the message.
        pads: Whether it has to pad.

    Raises:
        ValueError: If it has no token to pad with and needs one, or more tokens than the model knows.
    """
    if pads or tokenizer.eos_token is not None:
        pad(tokenizer, named)
    known = config.get_text_config().vocab_size
    if len(tokenizer) > known:
        raise ValueError(
            f"The tokenizer of {named} has {len(tokenizer)} tokens, but the model knows only {known}: name the "
            f"tokenizer that belongs to {model}."
        )


def pad(tokenizer: PreTrainedTokenizerBase, named: str) -> None:
    """Give a tokenizer a token to pad with.

    Args:
        tokenizer: The tokenizer.
        named: Where it comes from, for the message.

    Raises:
        ValueError: If it has no end of text that could be one.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {named} has no token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token


def _load_saved(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (*RUN_ERRORS, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"There is no tokenizer to be had from {name}: {reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes where there are no files of one
        raise ValueError(f"There is no tokenizer in {name}: name one by --tokenizer_name.")
    return tokenizer


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
