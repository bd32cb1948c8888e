"""Saves that fail in the first of several processes: `torchrun --nproc_per_node 2 tests/failing.py out`.

Every process writes to `out/result-RANK.json` how each save ended. A process that waits for another that has failed
would end by the timeout of its group.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sparse_models import masked
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_slim import save_slimmed
from hf_slim.parallel import gathering
from hf_slim.saving import save as saving


class BadTokenizer:
    """Fails in the middle of writing."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        """Fail."""
        raise self.error


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """The model spread over all processes."""
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def failing_build(model: torch.nn.Module, weights: dict) -> torch.nn.Module:
    """In place of `build_whole`."""
    raise MemoryError("no memory to put it together")


def main(out: Path) -> None:
    """Let saves fail and succeed by turns."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    (out / "file").write_text("mine")
    saves = {
        "a file": lambda: save_slimmed(masked(), out / "file"),
        "writing": lambda: save_slimmed(masked(), out / "slim", processing_class=BadTokenizer(OSError("disk full"))),
        "an interrupt": lambda: save_slimmed(
            masked(), out / "slim", processing_class=BadTokenizer(KeyboardInterrupt("stop"))
        ),
        "an upload": lambda: save_slimmed(masked(), out / "pushed", push_to_hub=True, repo_id="me/x"),
        "nothing": lambda: save_slimmed(masked(), out / "slim"),
        "sharded, writing": lambda: save_slimmed(
            shard(masked()), out / "sharded", processing_class=BadTokenizer(OSError("disk full"))
        ),
        "sharded, building": lambda: save_slimmed(shard(masked()), out / "sharded"),
        "sharded, nothing": lambda: save_slimmed(shard(masked()), out / "sharded"),
    }
    ends = {}
    for name, save in saves.items():
        saving.build_whole = failing_build if name == "sharded, building" else gathering.build_whole
        try:
            ends[name] = str(save().parameters_after)
        except BaseException as error:
            ends[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    model = masked()
    save_slimmed(model, out / "inplace", inplace=True, verify=False)
    ends["in place"] = str(sum(p.numel() for p in model.parameters()))
    (out / f"result-{rank}.json").write_text(json.dumps(ends))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
