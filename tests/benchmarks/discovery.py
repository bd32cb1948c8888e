"""Seconds that `find_structures` takes on the meta device, by the number of layers.

`python tests/benchmarks/discovery.py` prints a table for the shapes of Llama-7B and of bert-base with more layers: the
first call of the process and the median of five more.
"""

import statistics
import time

import torch
import transformers

from hf_slim import find_structures

LAYERS = (8, 16, 32, 64)


def _seconds(model: torch.nn.Module) -> float:
    start = time.perf_counter()
    find_structures(model)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    print("shape       layers  first (s)  median (s)")
    for name, model_class, config_class in (
        ("llama-7b", transformers.LlamaForCausalLM, transformers.LlamaConfig),
        ("bert-base", transformers.BertForMaskedLM, transformers.BertConfig),
    ):
        for layers in LAYERS:
            with torch.device("meta"):
                model = model_class(config_class(num_hidden_layers=layers))
            first = _seconds(model)
            median = statistics.median(_seconds(model) for _ in range(5))
            print(f"{name:10}  {layers:6}  {first:9.3f}  {median:10.3f}")


if __name__ == "__main__":
    main()
