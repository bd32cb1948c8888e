"""From rows to tokens and batches."""

import pytest
from datasets import Dataset
from transformers import BertConfig, DataCollatorWithPadding, PreTrainedConfig, default_data_collator

from hf_slim.cli.sequences import check_length, find_collator, tokenize_chunks, tokenize_pairs
from hf_slim.cli.tokenizer import load_tokenizer, make_byte_tokenizer


def test_only_a_language_model_needs_no_padding():
    tokenizer = make_byte_tokenizer()
    assert find_collator("causal-lm", tokenizer) is default_data_collator
    for task in ("classification", "regression"):
        collator = find_collator(task, tokenizer)
        assert isinstance(collator, DataCollatorWithPadding) and collator.tokenizer is tokenizer


def test_the_longest_sequence_is_that_of_model_and_tokenizer():
    tokenizer = make_byte_tokenizer()
    assert check_length(BertConfig(max_position_embeddings=16), tokenizer, 16) == 16
    with pytest.raises(ValueError, match="--max_seq_length 17 is more than the model takes, 16: make it smaller"):
        check_length(BertConfig(max_position_embeddings=16), tokenizer, 17)
    tokenizer.model_max_length = 8  # as that of a RoBERTa, whose positions begin at 2
    with pytest.raises(ValueError, match="--max_seq_length 9 is more than the model takes, 8"):
        check_length(PreTrainedConfig(), tokenizer, 9)


def test_pairs_are_tokenized_and_cut(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"))
    rows = Dataset.from_dict({"text": ["a b", "a a a a"], "text_pair": ["c", "b b"], "labels": [0.5, 1.0]})
    assert tokenize_pairs(rows, tokenizer, 6).to_dict() == {
        "labels": [0.5, 1.0],
        "input_ids": [[2, 5, 6, 3, 7, 3], [2, 5, 5, 3, 6, 3]],
        "token_type_ids": [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]],
        "attention_mask": [[1] * 6, [1] * 6],
    }


@pytest.mark.parametrize(("documents", "expected"), [(False, ["abcd", "efgh"]), (True, ["abc.", "defg", "hi.."])])
def test_text_is_joined_and_cut_into_chunks(documents, expected):
    tokenizer = make_byte_tokenizer()
    texts = ["abc", "defghi", ""] if documents else ["abc", "defgh", "i"]
    chunks = tokenize_chunks(Dataset.from_dict({"text": texts}), tokenizer, 4, documents=documents)
    ids = [[0 if letter == "." else tokenizer(letter)["input_ids"][0] for letter in chunk] for chunk in expected]
    assert chunks.to_dict() == {"input_ids": ids, "attention_mask": [[1] * 4] * len(ids), "labels": ids}


def test_text_shorter_than_a_chunk_is_refused():
    with pytest.raises(ValueError, match="A text of 5 tokens is too short for one sequence of max_seq_length=6"):
        tokenize_chunks(Dataset.from_dict({"text": ["abc", "de"]}), make_byte_tokenizer(), 6, documents=False)
