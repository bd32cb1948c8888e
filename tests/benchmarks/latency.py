"""Latency of slim models against dense ones and against stock models of the same sizes, timed alternately.

Run it with `python tests/benchmarks/latency.py`; it prints a Markdown table. A stock model is built from a config
alone, so the shapes are ones that a stock config can express.
"""

import argparse
import copy

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from hf_slim import find_structures, model_slim
from hf_slim.masking import zero_units
from hf_slim.report import measure_latency

ROWS = {
    "bge-small, FFN 0.8": (
        BertForSequenceClassification,
        BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536),
        {"ffn": 0.8, "mha": 0.0},
    ),
    "Llama, 512 wide, 8 layers, 0.5/0.5": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=8000,
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=8,
            intermediate_size=1408,
        ),
        {"ffn": 0.5, "mha": 0.5},
    ),
    "T5 encoder, 512 wide, 6 layers, 0.5/0.5": (
        T5EncoderModel,
        T5Config(d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=2048, vocab_size=8000),
        {"ffn": 0.5, "mha": 0.5},
    ),
}


def make_slim(model: PreTrainedModel, sparsities: dict[str, float]) -> PreTrainedModel:
    """A slim copy that keeps the first units of every structure."""
    slim = copy.deepcopy(model)
    structures = find_structures(slim).structures
    masks = {s.name: torch.arange(s.units) >= int(sparsities[s.kind] * s.units) for s in structures}
    zero_units(slim, structures, masks)
    return model_slim(slim)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    print("| shape | dense, ms | slim, ms | stock, ms | dense / slim | slim / stock |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (model_class, config, sparsities) in ROWS.items():
        torch.manual_seed(0)
        dense = model_class(config)
        slim = make_slim(dense, sparsities)
        if hasattr(slim.config, "slim"):
            raise SystemExit(f"{name}: a stock config cannot express this shape")
        stock = model_class(copy.deepcopy(slim.config))
        ids = torch.randint(5, 8000, (options.batch_size, options.length))
        models = {"dense": dense, "slim": slim, "stock": stock}
        times = measure_latency(models, {"input_ids": ids}, repeats=options.repeats)
        print(
            f"| {name} | {times['dense']:.1f} | {times['slim']:.1f} | {times['stock']:.1f} "
            f"| {times['dense'] / times['slim']:.2f} | {times['slim'] / times['stock']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
