"""Tokenizers from a vocabulary file and of single bytes."""

import pytest
from transformers import AutoTokenizer

from hf_slim.cli.tokenizer import load_tokenizer, make_byte_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "Héllo  wörld\n\tfoo 世界"


def test_bytes_encode_every_text_and_survive_saving(tmp_path):
    tokenizer = make_byte_tokenizer()
    assert len(tokenizer) == 257
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode()) == 26
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == ids
    assert loaded.decode(ids) == TEXT
    assert loaded.eos_token_id == 0


def _write_vocabulary(path, words):
    path.write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    return str(path)


def test_a_vocabulary_file_makes_a_bert_tokenizer(tmp_path):
    tokenizer = load_tokenizer(_write_vocabulary(tmp_path / "vocab.txt", ["hello", "##s", "world"]))
    assert tokenizer("Hellos", "WORLD")["input_ids"] == [2, 5, 6, 3, 7, 3]
    assert tokenizer("Hellos", "WORLD")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))("Hellos", "WORLD")["input_ids"] == [2, 5, 6, 3, 7, 3]


def test_a_vocabulary_with_capitals_is_cased(tmp_path):
    tokenizer = load_tokenizer(_write_vocabulary(tmp_path / "vocab.txt", ["Hello", "hello"]))
    assert tokenizer("Hello hello")["input_ids"] == [2, 5, 6, 3]


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\nhello\n")
    with pytest.raises(
        ValueError, match=r"words\.txt lacks \[CLS\], \[SEP\], \[MASK\]: a BERT vocabulary has one piece"
    ):
        load_tokenizer(str(tmp_path / "words.txt"))
