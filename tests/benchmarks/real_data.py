"""Dense, masked and slimmed on real data, through `hf-slim run`.

    python tests/benchmarks/real_data.py trec --data DATA
    python tests/benchmarks/real_data.py trec stsb gpt2 llama --data DATA --seeds 1 2 3 --sparsities 0.5,0.5 0.8,0.6

DATA is a folder with `trec/{train,test}.csv`, `stsb/{train,dev}.csv`, `tinyshakespeare/input.txt` and
`bert-vocab/vocab.txt`. Every model is trained from scratch. Prints a Markdown table, a line for each run.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import BertConfig, GPT2Config, LlamaConfig

from hf_slim.cli import main as hf_slim

BERT = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
GPT2 = GPT2Config(n_embd=128, n_layer=4, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LLAMA = LlamaConfig(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=384,
    max_position_embeddings=128,
    initializer_range=0.05,
)
VOCABULARY = ("--tokenizer_name", "{data}/bert-vocab/vocab.txt")
SHAKESPEARE = (
    *("--train_file", "{data}/tinyshakespeare/input.txt", "--max_seq_length", "128", "--num_train_epochs", "1"),
    *("--per_device_train_batch_size", "16", "--learning_rate", "2e-3", "--lr_scheduler_type", "cosine"),
)
RECIPES = {
    "trec": (
        BertConfig(**BERT, max_position_embeddings=64),
        (
            *VOCABULARY,
            *("--train_file", "{data}/trec/train.csv", "--validation_file", "{data}/trec/test.csv"),
            *("--max_seq_length", "40", "--num_train_epochs", "10"),
            *("--per_device_train_batch_size", "32", "--learning_rate", "5e-4"),
        ),
    ),
    "stsb": (
        BertConfig(**BERT, max_position_embeddings=128),
        (
            *VOCABULARY,
            *("--train_file", "{data}/stsb/train.csv", "--validation_file", "{data}/stsb/dev.csv"),
            *("--text_column", "sentence1", "sentence2", "--label_column", "score"),
            *("--max_seq_length", "64", "--num_train_epochs", "3", "--lr_scheduler_type", "cosine"),
            *("--per_device_train_batch_size", "32", "--learning_rate", "5e-4"),
        ),
    ),
    "gpt2": (GPT2, SHAKESPEARE),
    "llama": (LLAMA, SHAKESPEARE),
}
SHARED = (
    *("--warmup_steps", "0.1", "--weight_decay", "0.01", "--save_strategy", "no"),
    *("--report_to", "none", "--per_device_eval_batch_size", "50", "--logging_steps", "200", "--log_level", "warning"),
)


def main() -> None:
    """Run the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", nargs="+", default=["42"])
    parser.add_argument("--sparsities", nargs="+", default=["0.5,0.5"], help="FFN2 and MHA sparsity of each run")
    options, flags = parser.parse_known_args()
    lines = ["| recipe | sparsities | seed | metric | dense | masked | slimmed | parameters | speed-up |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for recipe in options.recipes:
        for seed in options.seeds:
            for sparsities in options.sparsities:
                models = run(recipe, options.data, seed, *sparsities.split(","), flags)
                lines += format_lines(f"| {recipe} | {sparsities} | {seed} ", models)
    print("\n".join(["", *lines]))


def run(recipe: str, data: str, seed: str, ffn2: str, mha: str, flags: Sequence[str] = ()) -> dict[str, dict]:
    """One run in a temporary folder: the figures of the dense, the masked and the slimmed model."""
    config, own = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        config.to_json_file(f"{folder}/config.json", use_diff=False)
        status = hf_slim(
            [
                *("run", "--config_name", f"{folder}/config.json", "--output_dir", f"{folder}/out", "--seed", seed),
                *("--ffn2_sparsity", ffn2, "--mha_sparsity", mha, *SHARED),
                *(flag.format(data=data) for flag in own),
                *flags,
            ]
        )
        if status != 0:
            raise SystemExit(status)
        return json.loads(Path(folder, "out", "comparison.json").read_text())


def format_lines(start: str, models: dict[str, dict]) -> list[str]:
    """The lines of the table for one run, a line for each metric."""
    dense, slimmed = models["dense"], models["slimmed"]
    sizes = f"{dense['parameters']:,} -> {slimmed['parameters']:,}"
    speed_up = dense["latency_ms"] / slimmed["latency_ms"]
    return [
        f"{start}| {metric} "
        + "".join(_cell(models[name], metric) for name in ("dense", "masked", "slimmed"))
        + f"| {sizes} | {speed_up:.2f} |"
        for metric in dense["metrics"]
    ]


def _cell(model: dict | None, metric: str) -> str:
    """A figure; none of a masked model where dropped units left it while it trained."""
    return "| - " if model is None else f"| {model['metrics'][metric]:.4f} "


if __name__ == "__main__":
    main()
