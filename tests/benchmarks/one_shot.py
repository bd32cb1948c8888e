"""One-shot slimming: the loss that each method adds without training, and what slimming a large model takes.

    python tests/benchmarks/one_shot.py quality --data DATA
    python tests/benchmarks/one_shot.py quality --data DATA --models gpt2 --seeds 1 2 --sparsities 0.3,0.3 --cache DIR
    python tests/benchmarks/one_shot.py memory --layers 22 --samples 128 --length 512

DATA is a folder with `tinyshakespeare/input.txt`. `quality` trains small language models on its bytes and slims copies
of each; it prints the loss on held-out text that every method adds. `memory` slims a Llama of the shape of one with
1.1 billion parameters and random weights, and prints the time and the peak of resident memory over what there was
before the model was made, as a fraction of its weights (Linux, on the CPU).
"""

import argparse
import copy
import resource
import statistics
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from hf_slim import SlimConfig, slim
from hf_slim.saving import count_bytes, count_parameters

LENGTH, BATCH, STEPS, RATE = 128, 8, 500, 2e-3
SMALL = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
METHODS = ("obs", "flap", "taylor", "magnitude")


def make_model(name: str) -> PreTrainedModel:
    """A small language model for bytes, with random weights."""
    if name == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=8, n_positions=LENGTH, **dropout, **SMALL))
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=384, initializer_range=0.05, **SMALL))


def train(name: str, rows: torch.Tensor, seed: int, steps: int) -> PreTrainedModel:
    """A small model after some steps on rows of bytes."""
    set_seed(seed)
    model = make_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        ids = rows[torch.randint(len(rows), (BATCH,))]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"  {name}, seed {seed}, step {step} of {steps}", flush=True)
    return model.eval()


@torch.no_grad()
def measure_loss(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """The mean loss over rows of bytes."""
    return statistics.mean(float(model(input_ids=ids, labels=ids).loss) for ids in rows.split(50))


def compare(options: argparse.Namespace) -> None:
    """Print the loss that each method adds, for each model and sparsity over the seeds."""
    text = (Path(options.data) / "tinyshakespeare" / "input.txt").read_bytes()
    ids = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    split = len(ids) * 9 // 10
    rows, held_out = ids[:split], ids[split:][:400]
    added: dict[tuple[str, str, str], list[float]] = {}
    for name in options.models:
        for seed in options.seeds:
            model = load(name, rows, seed, options)
            dense = measure_loss(model, held_out)
            chosen = torch.randperm(split, generator=torch.Generator().manual_seed(seed))[: options.samples]
            data = [{"input_ids": row, "labels": row} for row in rows[chosen]]
            print(f"{name}, seed {seed}: the dense model's loss is {dense:.4f}", flush=True)
            for sparsities in options.sparsities:
                ffn2, mha = map(float, sparsities.split(","))
                config = SlimConfig(
                    ffn2_sparsity=ffn2, mha_sparsity=mha, slim_scope=options.scope, slim_round_to=options.round_to
                )
                for method in options.methods:
                    slimmed = copy.deepcopy(model)
                    slim(slimmed, data, config, num_calibration_samples=len(data), method=method)
                    loss = measure_loss(slimmed, held_out) - dense
                    added.setdefault((name, sparsities, method), []).append(loss)
                    print(f"  {sparsities} {method}: +{loss:.4f}", flush=True)
    print("\n| model | sparsities | method | loss added | standard error |\n| --- | --- | --- | ---: | ---: |")
    for (name, sparsities, method), values in added.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"| {name} | {sparsities} | {method} | {statistics.mean(values):.4f} | {error:.4f} |")


def load(name: str, rows: torch.Tensor, seed: int, options: argparse.Namespace) -> PreTrainedModel:
    """A trained model, from the cache if there is one."""
    folder = Path(options.cache) / f"{name}-{seed}-{options.steps}" if options.cache else None
    if folder is not None and folder.is_dir():
        return type(make_model(name)).from_pretrained(folder).eval()
    model = train(name, rows, seed, options.steps)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def measure(options: argparse.Namespace) -> None:
    """Print time and peak memory of slimming a large model."""
    before = read_memory("VmRSS")
    config = LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    set_seed(0)
    model = LlamaForCausalLM(config).eval()
    size = count_bytes(model)
    print(f"{count_parameters(model):,} parameters, {size / 1e9:.2f} GB", flush=True)
    data = [{"input_ids": torch.randint(32000, (options.length,))} for _ in range(options.samples)]
    asked = SlimConfig(ffn2_sparsity=0.5, mha_sparsity=0.5, slim_scope=options.scope)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    begin = time.perf_counter()
    slim(model, data, asked, num_calibration_samples=options.samples, batch_size=options.batch_size)
    seconds = time.perf_counter() - begin
    peak = read_memory("VmHWM") - before
    print(f"{options.samples} x {options.length} tokens, {options.layers} layers, scope {options.scope}:")
    print(f"{seconds:.0f} s; peak {peak / 1e9:.2f} GB, {peak / size:.3f} of the weights")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB resident in the whole process at most")


def read_memory(field: str) -> int:
    """Bytes of resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "memory"))
    parser.add_argument("--data")
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama"], choices=("gpt2", "llama"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--sparsities", nargs="+", default=["0.3,0.3", "0.5,0.5"])
    parser.add_argument("--scope", default="global", choices=("global", "local"))
    parser.add_argument("--round_to", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--cache", help="Folder in which trained models are kept")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    if options.part == "memory":
        measure(options)
    elif options.data is None:
        parser.error("quality needs --data")
    else:
        compare(options)


if __name__ == "__main__":
    main()
