"""The data and settings of `hf-slim demo`: how far do two opinions agree?"""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

from transformers import BertConfig

_PEOPLE = ("critic", "audience", "teacher", "reporter", "student", "neighbour")
_PARTS = ("plot", "music", "acting", "ending", "dialogue", "scenery")
_OPINIONS = {
    **{"awful": -3, "terrible": -3, "boring": -2, "dull": -2, "weak": -1, "slow": -1, "plain": 0},
    **{"ordinary": 0, "nice": 1, "pleasant": 1, "good": 2, "lovely": 2, "superb": 3, "brilliant": 3},
}
_FURTHEST = 6
_NOISE = 0.5  # standard deviation of the score, as of human raters
_WORDS = ("the", "says", "is", *_PEOPLE, *_PARTS, *_OPINIONS)
_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS)
_TRAIN_ROWS, _VALIDATION_ROWS = 4000, 500


def demo_flags(folder: Path) -> list[str]:
    """List the flags of `hf-slim run` that make the demo.

    Args:
        folder: Where `write_demo` writes the files.

    Returns:
        The flags; those given later on the same command line win.
    """
    return [
        *("--config_name", str(folder / "config.json"), "--tokenizer_name", str(folder / "vocab.txt")),
        *("--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.csv")),
        *("--text_column", "sentence1", "sentence2", "--label_column", "score", "--max_seq_length", "32"),
        *("--ffn2_sparsity", "0.5", "--mha_sparsity", "0.5"),
        *("--num_train_epochs", "5", "--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "50"),
        *("--learning_rate", "5e-4", "--warmup_steps", "0.1", "--logging_steps", "125", "--save_strategy", "no"),
        *("--report_to", "none", "--log_level", "warning", "--dataloader_pin_memory", "false"),
    ]


def write_demo(folder: Path) -> None:
    """Write the data, the vocabulary and the config of the demo.

    Each sentence is an opinion; the score, from 0 to 5, is how far the two agree, so that it takes both to tell. Some
    noise keeps the correlation below 1.

    Args:
        folder: Gets `train.csv`, `validation.csv`, `vocab.txt` and `config.json`; made if it is not there.

    Raises:
        ValueError: If files of these names are there that the demo did not write.
    """
    texts = _make_texts()
    there = [name for name in texts if (folder / name).exists()]
    changed = [name for name in there if (folder / name).read_bytes() != texts[name].encode()]
    if (folder / "config.json").exists() and len(there) < len(texts):
        changed.append("config.json")
    if changed:
        raise ValueError(f"{folder / changed[0]} is there and is not the demo's: name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    BertConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    ).to_json_file(folder / "config.json", use_diff=False)


def _make_texts() -> dict[str, str]:
    """What the files hold, by their names."""
    texts = {"vocab.txt": "\n".join(_VOCABULARY) + "\n"}
    generator = random.Random(0)
    for name, rows in (("train.csv", _TRAIN_ROWS), ("validation.csv", _VALIDATION_ROWS)):
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(("sentence1", "sentence2", "score"))
        writer.writerows(_make_pair(generator) for _ in range(rows))
        texts[name] = file.getvalue()
    return texts


def _make_pair(generator: random.Random) -> tuple[str, str, float]:
    first, one = _make_sentence(generator)
    second, other = _make_sentence(generator)
    score = 5 * (1 - abs(one - other) / _FURTHEST) + generator.gauss(0, _NOISE)
    return first, second, round(min(max(score, 0.0), 5.0), 2)


def _make_sentence(generator: random.Random) -> tuple[str, int]:
    """A sentence and how favourable it is."""
    opinion = generator.choice(list(_OPINIONS))
    sentence = f"the {generator.choice(_PEOPLE)} says the {generator.choice(_PARTS)} is {opinion}"
    return sentence, _OPINIONS[opinion]
