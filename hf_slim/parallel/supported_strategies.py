"""Which ways of spreading a training over devices slimming can follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import is_available, is_initialized
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..structures import has_adapters
from .gathering import is_spread
from .sharded_tensors import is_sharded

FSDP_DIMS = ("fsdp", "dp_shard", "dp_shard_cp")
"""What transformers and accelerate call the dimension of a device mesh over which FSDP2 shards."""

_SUPPORTED = "data parallelism (DDP), FSDP2 and DeepSpeed ZeRO are supported"


def refuse_strategy(model: nn.Module, args: TrainingArguments | None = None) -> None:
    """Refuse a model that is spread over devices in a way that slimming cannot follow.

    Args:
        model: The model, after it has been prepared for training.
        args: The arguments of the training, if there is one.

    Raises:
        ValueError: If it is; the message names the strategy.
    """
    found = next(_find_unsupported(model, args), None)
    if found is not None:
        raise ValueError(f"Slimming does not work with {found}: {_SUPPORTED}.")


def find_fixed_shapes(model: nn.Module, args: TrainingArguments | None = None) -> str | None:
    """Say why the shapes of parameters cannot change in the middle of a training.

    Args:
        model: The model, after it has been prepared for training.
        args: The arguments of the training; None in a loop of somebody's own, where the model and the process tell.

    Returns:
        The reason, None if they can change.
    """
    devices = _find_devices(model) if args is None else _ask_for_devices(args)
    if devices is not None:
        return (
            f"the training runs on several devices ({devices}), where buffers for the gradients or "
            "copies of the model have the shapes of its beginning"
        )
    if is_spread(model):
        return "the parameters are sharded, and the parts have the shapes of the beginning"
    if args is not None and args.deepspeed is not None:
        return "DeepSpeed keeps the parameters in buffers of its own, which have the shapes of the beginning"
    if has_adapters(model):
        return f"{type(model).__name__} has adapters, which are merged before anything can be removed"
    return None


def _ask_for_devices(args: TrainingArguments) -> str | None:
    is_one = args.parallel_mode == ParallelMode.NOT_PARALLEL and args.world_size <= 1
    return None if is_one else args.parallel_mode.value


def _find_devices(model: nn.Module) -> str | None:
    """What spreads a training of somebody's own, seen from what is called or from the processes that talk together."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return type(model).__name__
    if is_available() and is_initialized():
        return "a process group of torch.distributed"
    return None


def _find_unsupported(model: nn.Module, args: TrainingArguments | None) -> Iterator[str]:
    kind = args.distributed_state.distributed_type if args is not None and args.distributed_state else None
    if kind == DistributedType.MEGATRON_LM:
        yield "Megatron-LM"
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    parallelism: Any = getattr(args, "parallelism_config", None)
    for name, attribute in (
        ("pipeline parallelism", "pp_size"),
        ("tensor parallelism", "tp_size"),
        ("expert parallelism", "ep_size"),
        ("context parallelism", "cp_size"),
        ("sequence parallelism", "sp_size"),
    ):
        for owner in (config, parallelism):
            if (getattr(owner, attribute, None) or 1) > 1:
                yield f"{name} ({attribute}={getattr(owner, attribute)})"
    if is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            yield "FSDP version 1, which flattens the parameters (set fsdp_version: 2 in fsdp_config)"
    for name, tensor in model.named_parameters():
        if is_sharded(tensor):
            yield from _odd_dims(name, tensor)


def _odd_dims(name: str, tensor: Any) -> Iterator[str]:
    names = tensor.device_mesh.mesh_dim_names or ()
    for number, place in enumerate(tensor.placements):
        dim = names[number] if names else None
        if place.is_partial() or (place.is_shard() and dim is not None and dim not in FSDP_DIMS):
            yield f"{name} placed as {place} over the mesh dimension {dim!r} (tensor parallelism)"
