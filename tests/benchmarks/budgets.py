"""Budgets: how near six shapes come to what was asked, and fixed sparsities against a budget of the same cost.

    python tests/benchmarks/budgets.py shapes
    python tests/benchmarks/budgets.py quality --text tinyshakespeare/input.txt --steps 400 --seeds 0 1 2

`shapes` plans budgets for middle-size models with random scores, and counts or times what comes of them (medians of
40 passes in turn with the dense model). `quality` trains a GPT-2 of single bytes, slims it under way to 0.8/0.6, then
again for each kind of budget to what that model costs. Prints Markdown tables.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_slim import SlimConfig, SlimTrainerCallback, find_structures
from hf_slim.arguments import read_budget
from hf_slim.compaction import compact_model
from hf_slim.costs.budget_costs import find_costs
from hf_slim.costs.flop_costs import make_batches
from hf_slim.costs.timing import choose_clock, time_alternately
from hf_slim.training.plan import make_plan

FIELDS = ("slim_target_params", "slim_target_flops", "slim_target_latency")
STACK = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024}
GROUPED = {**STACK, "num_key_value_heads": 4, "vocab_size": 2000}
T5 = {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 3, "num_heads": 8, "vocab_size": 2000}
SHAPES = {
    "BertForSequenceClassification": {**STACK, "vocab_size": 2000},
    "GPT2LMHeadModel": {"n_embd": 256, "n_layer": 4, "n_head": 8, "vocab_size": 2000},
    "LlamaForCausalLM": GROUPED,
    "T5ForConditionalGeneration": T5,
    "ViTForImageClassification": {**STACK, "image_size": 112},
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 4},
}
CPU = torch.device("cpu")
BATCH, LENGTH = 16, 128


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shapes", "quality"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.8, 0.5])
    parser.add_argument("--fields", nargs="+", default=FIELDS, choices=FIELDS)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    if options.what == "shapes":
        print("| shape | budget | asked | got | off |\n| --- | --- | ---: | ---: | ---: |")
        for name, sizes in SHAPES.items():
            for field in options.fields:
                for fraction in options.fractions:
                    print(measure_shape(name, sizes, field, fraction), flush=True)
    else:
        print("| seed | asked | loss | parameters | FLOPs | ms | ffn2 | mha |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for seed in options.seeds:
            compare(options.text.read_bytes(), options.steps, seed, options.fields)


def measure_shape(name: str, sizes: dict[str, int], field: str, fraction: float) -> str:
    """A line of the table: what a model of a shape has of its dense one after all pruning steps of a budget."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes)).eval()
    try:
        plan = make_plan(model, SlimConfig(**{field: fraction}), 1000, found=find_structures(model))
    except ValueError as error:
        return f"| {name} | {field} | {fraction:.1%} | {error} | |"
    generator = torch.Generator().manual_seed(3)
    scores = {s.name: torch.rand(s.units, generator=generator) * (1 + n) for n, s in enumerate(plan.structures)}
    for structure in plan.structures:  # a head is worth more than a channel
        scores[structure.name] *= 50 if structure.kind == "mha" else 1
    masks = {s.name: torch.ones(s.units, dtype=torch.bool) for s in plan.structures}
    for step in plan.budget.schedule.steps:
        masks = plan.budget.select(scores, masks, step)
    slim = copy.deepcopy(model)
    compact_model(slim, plan.structures, masks)
    got = find_part(field, model, slim)
    return f"| {name} | {field} | {fraction:.1%} | {got:.2%} | {got / fraction - 1:+.2%} |"


def find_part(field: str, dense: nn.Module, slim: nn.Module) -> float:
    """What a slim model has of a dense one, by itself and not by what a budget says of it."""
    (batch,) = make_batches(dense, field)
    if field == "slim_target_params":
        counts = [sum(p.numel() for p in model.parameters()) for model in (dense, slim)]
    elif field == "slim_target_flops":
        counts = [count_flops(copy.deepcopy(model), batch) for model in (dense, slim)]
    else:
        calls: dict[str, Callable] = {"dense": lambda: dense(**batch), "slim": lambda: slim(**batch)}
        with torch.inference_mode():
            times = time_alternately(calls, repeats=40, device=CPU, desc="Time", clock=choose_clock(CPU))
        counts = [statistics.median(times[name]) for name in ("dense", "slim")]
    return counts[1] / counts[0]


def count_flops(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """The operations of a forward pass, run on values."""
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def compare(text: bytes, steps: int, seed: int, fields: list[str]) -> None:
    """Print a line for the dense model, for fixed sparsities and for each budget of what that costs."""
    counts = {}
    train(text, steps, seed, "dense", SlimConfig(), counts)
    kept = train(text, steps, seed, "0.8/0.6", SlimConfig(ffn2_sparsity=0.8, mha_sparsity=0.6), counts)
    for field in fields:
        asked = counts[field].find(kept)
        value = f"{asked}ms" if field == "slim_target_latency" else round(asked)
        train(text, steps, seed, field, SlimConfig(**{field: value}), counts)


def train(text: bytes, steps: int, seed: int, name: str, config: SlimConfig, counts: dict) -> dict[str, int]:
    """Train, print a line, and give the sizes; what units cost is found with the first model."""
    set_seed(seed)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4, n_positions=256, vocab_size=256, **quiet))
    structures = find_structures(model).structures
    counts = counts or counts.update({field: find(model, structures, field) for field in FIELDS}) or counts
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=steps,
            seed=seed,
            use_cpu=True,
        )
        slimming = [] if name == "dense" else [SlimTrainerCallback(config)]
        held_out = len(data) // 20
        trainer = Trainer(
            model, arguments, train_dataset=data[:-held_out], eval_dataset=data[-held_out:], callbacks=slimming
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    masks = slimming[0].masks if slimming else {}
    kept = {s.name: int(masks[s.name].sum()) if masks else s.units for s in structures}
    params, flops, latency = (counts[field].find(kept) for field in FIELDS)
    sparsities = slimming[0].sparsities().values() if slimming else (0.0, 0.0)
    ffn2, mha = (f"{sparsity:.2f}" for sparsity in sparsities)
    print(
        f"| {seed} | {name} | {loss:.4f} | {params:,.0f} | {flops:,.0f} | {latency:.3f} | {ffn2} | {mha} |", flush=True
    )
    return kept


def find(model: nn.Module, structures: tuple, field: str):
    """What units cost, in what a budget is counted in."""
    floors = {s.name: 32 if s.kind == "ffn" else 1 for s in structures}
    budget = read_budget(SlimConfig(**{field: 0.5}))
    return find_costs(model, budget, structures, found=structures, sizes={}, floors=floors, multiples=floors)


if __name__ == "__main__":
    main()
