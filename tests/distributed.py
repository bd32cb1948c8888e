"""One training in one process or in several: `torchrun --nproc_per_node 2 tests/distributed.py fsdp llama out`.

The ways are `single`, `ddp`, `fsdp` (FSDP2), and `zero2` and `zero3` (DeepSpeed, where it is installed).

Writes the masks, the weights and what was logged to `out`, and the slim model to `out/slim`. `compare` says how the
results of two of these runs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import build
from safetensors.torch import load_file
from trainers import make_data, slim_callback
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_slim import SlimTrainer, SlimTrainerCallback, SlimTrainingArguments, save_slimmed

GLOBAL_BATCH = 8
PLANS = {"bert": {"bert.encoder.layer.*": "free_full_weight", "bert.embeddings": "free_full_weight"}, "llama": None}
EXACT = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "llama": {}}
"""Dropout draws other random numbers where batches are divided."""
CLASSES = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}


class MaskLog(TrainerCallback):
    """Keeps the masks of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[bool]]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Append them."""
        self.steps.append({name: mask.tolist() for name, mask in self.slim.masks.items()})


def train(
    mode: str,
    name: str,
    out: Path,
    *,
    slim: bool = True,
    teacher: bool = False,
    resume: str | None = None,
    **changes: object,
) -> None:
    """Train a tiny model with a whole schedule and save it slimmed."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dense = out / "dense"
    config = {}
    if mode.startswith("zero"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif mode != "single":
        dist.init_process_group("gloo")
    args = SlimTrainingArguments(
        out / "run",
        deepspeed=_zero_config(int(mode[-1])) if mode.startswith("zero") else None,
        max_steps=12,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no" if mode == "fsdp" else "steps",  # what transformers shards at loading it cannot resume
        save_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        weight_decay=0.1,
        average_tokens_across_devices=False,  # else losses that do not count tokens are taken times the processes
        ffn2_sparsity=0.5,
        mha_sparsity=0.5,
        slim_round_to=8,
        slim_start=2,
        slim_end=8,
        slim_teacher=str(out / "teacher") if teacher else None,
        slim_hidden_weight=1.0 if teacher else 0.0,
    )
    if rank == 0:
        build(name, spread=0.05, **changes).save_pretrained(dense)
        if teacher:
            build(name, seed=5, spread=0.05, **changes).save_pretrained(out / "teacher")
    if mode == "fsdp":
        config = {"distributed_config": DistributedConfig(fsdp_size=world, fsdp_plan=PLANS[name])}
    if mode != "single":
        dist.barrier()
    model = CLASSES[name].from_pretrained(dense, **config)
    log = MaskLog()
    callbacks = [SlimTrainerCallback(), log] if slim else []
    trainer_class = SlimTrainer if teacher else Trainer
    trainer = trainer_class(model, args, train_dataset=make_data(build(name, **changes)), callbacks=callbacks)
    log.slim = slim_callback(trainer) if slim else None
    trainer.train(resume_from_checkpoint=resume)
    (out / f"peak-{rank}.txt").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    if slim:
        report = save_slimmed(trainer, out / "slim")
        result = {
            "masks": log.steps,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "distances": [entry.get("distill_loss") for entry in trainer.state.log_history if "loss" in entry],
            "parameters": report.parameters_after,
        }
        (out / f"result-{rank}.json").write_text(json.dumps(result))
    if mode != "single":
        dist.destroy_process_group()


def _zero_config(stage: int) -> dict[str, object]:
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 100,  # biases stay whole, weights do not
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def compare(one: Path, several: Path) -> dict[str, float]:
    """How far the run in several processes is from the one in one process.

    Args:
        one: What the run in one process wrote.
        several: What the other wrote.

    Returns:
        Steps with other masks in any process; the largest differences of the losses and of the weights of the slim
        model.
    """
    expected = json.loads((one / "result-0.json").read_text())
    found = [json.loads(path.read_text()) for path in sorted(several.glob("result-*.json"))]
    expected["masks"] = expected["masks"][-len(found[0]["masks"]) :]  # where the other was resumed
    return {
        "processes": len(found),
        "steps": len(expected["masks"]),
        "other_masks": sum(
            masks != wanted
            for result in found
            for masks, wanted in zip(result["masks"], expected["masks"], strict=True)
        ),
        "other_parameters": sum(result["parameters"] != expected["parameters"] for result in found),
        "loss": max(abs(a - b) for a, b in zip(found[0]["losses"], expected["losses"], strict=True)),
        "weights": _largest_difference(one / "slim", several / "slim"),
    }


def _largest_difference(one: Path, other: Path) -> float:
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["single", "ddp", "fsdp", "zero2", "zero3"])
    parser.add_argument("model", choices=sorted(CLASSES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", help="checkpoint to resume from")
    parser.add_argument("--dense", action="store_true", help="without slimming")
    parser.add_argument("--teacher", action="store_true", help="with a teacher")
    parser.add_argument("--width", type=int, default=32, help="of the hidden states")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {} if options.width == 32 else {"hidden_size": options.width, "intermediate_size": 4 * options.width}
    train(
        options.mode,
        options.model,
        options.out,
        slim=not options.dense,
        teacher=options.teacher,
        resume=options.resume,
        **EXACT[options.model],
        **sizes,
    )
