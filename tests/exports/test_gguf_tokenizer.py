"""What a GGUF file says of a tokenizer."""

import pytest
from conftest import build
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from hf_slim.cli.tokenizer import make_byte_tokenizer
from hf_slim.exports import export_gguf
from hf_slim.exports.gguf_tokenizer import read_vocabulary

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(pattern, byte_level=True, begin=None, normalizer=None, template=None, **fields):
    """A tokenizer of five tokens and two merges that splits text by a pattern."""
    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "abb": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "b")], **fields))
    if normalizer:
        tokenizer.normalizer = normalizer
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("b", 2)]
        )
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
    assert not vocabulary.adds_end


def test_single_digits_have_a_name():
    tokenizer = make_tokenizer(None)
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    assert read_vocabulary(tokenizer, 5).splitting == "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(False), words[1]])
    with pytest.raises(ValueError, match=r"The tokenizer \(BPE after Digits, ByteLevel\) is none of those"):
        read_vocabulary(tokenizer, 5)


@pytest.mark.parametrize(
    ("template", "begin", "expected"),
    [("<s> $A", "<s>", (True, False)), ("$A <s>", None, (False, True)), ("<s> $A <s>", "<s>", (True, True))],
)
def test_what_is_added_to_texts_is_written(template, begin, expected):
    vocabulary = read_vocabulary(make_tokenizer(QWEN2, begin=begin, template=template), 5)
    assert (vocabulary.adds_begin, vocabulary.adds_end) == expected


def test_composed_text_is_taken():
    assert read_vocabulary(make_tokenizer(QWEN2, normalizer=normalizers.NFC()), 5).splitting == "qwen2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": normalizers.Lowercase()}, "The tokenizer changes the text by Lowercase, which llama.cpp does"),
        ({"end_of_word_suffix": "</w>"}, "The tokenizer marks the ends or the middles of words, which llama.cpp does"),
        ({"template": "$A b"}, r"makes \[1, 2\] of a text that is \[1\]: llama.cpp can add a bos_token before it"),
    ],
)
def test_what_llama_cpp_does_not_do_to_text_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"{message}.*Export a copy of the folder without its tokenizer files"):
        read_vocabulary(make_tokenizer(QWEN2, **changes), 5)


def test_a_space_before_the_text_is_refused():
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match="The tokenizer puts a space before the text .* which llama.cpp does not do"):
        read_vocabulary(tokenizer, 5)


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


@pytest.mark.slow
@pytest.mark.parametrize("added", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("splitting", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_llama_cpp_reads_text_the_same(splitting, added, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    texts = ["the cat. \n it's 1234567", "\u00c9t\u00e9 cafe\u0301 The DOG", " leading\n\n  x", "<s> special</s>"]
    patterns = {"llama-bpe": QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| "), "qwen2": QWEN2}
    splits = [pre_tokenizers.Split(Regex(patterns[splitting]), "isolated")] if splitting in patterns else []
    digits = [pre_tokenizers.Digits(individual_digits=True)] if splitting == "smollm" else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, *digits, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:3] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=added,
        special_tokens=[(token, number) for number, token in enumerate(("<s>", "</s>")) if token in added],
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    build("llama", vocab_size=302, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path)
    loaded = llama_cpp.Llama(str(export_gguf(tmp_path, tmp_path / "a.gguf")), vocab_only=True, verbose=False)
    found = [loaded.tokenize(text.encode(), special=True) for text in texts]
    loaded.close()
    assert found == [AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] for text in texts]
