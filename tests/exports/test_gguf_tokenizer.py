"""What a GGUF file says of a tokenizer."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.exports.gguf_tokenizer import read_vocabulary

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(pattern, byte_level=True, begin=None):
    """A tokenizer of five tokens and two merges that splits text by a pattern."""
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "abb": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "b")]))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    if byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token="<s>")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [(QWEN2, "qwen2"), (QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| "), "llama-bpe"), (None, "gpt-2")],
)
def test_the_way_of_splitting_has_a_name(pattern, name):
    vocabulary = read_vocabulary(make_tokenizer(pattern), 7)
    assert vocabulary.splitting == name
    assert vocabulary.tokens == ["<s>", "a", "b", "ab", "abb", "[PAD5]", "[PAD6]"]
    assert vocabulary.kinds == [3, 1, 1, 1, 1, 5, 5]
    assert vocabulary.merges == ["a b", "ab b"]
    assert vocabulary.special == {"eos": 0}
    assert not vocabulary.adds_begin


def test_single_bytes_have_a_merge_that_never_happens():
    vocabulary = read_vocabulary(make_byte_tokenizer(), 257)
    assert vocabulary.merges == ["<|endoftext|><|endoftext|> <|endoftext|>"]
    assert vocabulary.special == {"bos": 0, "eos": 0, "pad": 0}


def test_no_tokenizer_is_no_vocabulary():
    assert read_vocabulary(None, 7) is None


@pytest.mark.parametrize(
    "tokenizer",
    [
        make_tokenizer(r"\w+"),
        make_tokenizer(QWEN2, byte_level=False),
        BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}),
    ],
    ids=["pattern", "letters", "WordPiece"],
)
def test_other_tokenizers_are_refused(tokenizer):
    with pytest.raises(ValueError, match="none of those that can be written: byte-level BPE"):
        read_vocabulary(tokenizer, 100)


def test_more_tokens_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match="The tokenizer has 5 tokens, but the model only 4"):
        read_vocabulary(make_tokenizer(QWEN2), 4)
