"""A model that is spread over processes, put together in one of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed

from .deepspeed_zero import is_partitioned, whole_state_dict
from .sharded_tensors import has_shards

Result = TypeVar("Result")


def is_spread(model: nn.Module) -> bool:
    """Whether each process holds only a part of a model."""
    return has_shards(model) or any(map(is_partitioned, model.parameters()))


def is_first_process() -> bool:
    """Whether this is the only process, or the one that writes files."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Bring the weights of a sharded model to the CPU of the first process, one tensor after the other.

    Args:
        model: The sharded model; every process has to call this.

    Returns:
        The whole weights in the first process; nothing in the others.

    Raises:
        ValueError: If it is no transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A sharded {type(model).__name__} cannot be put together: only a PreTrainedModel without adapters can."
        )
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if any(map(is_partitioned, model.parameters())):
        return whole_state_dict(model)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def build_whole(model: PreTrainedModel, weights: dict[str, Any]) -> PreTrainedModel:
    """Put a sharded model together; only one process has to call this.

    Args:
        model: The sharded model.
        weights: What `gather_weights` gave in this process.

    Returns:
        A model of its own with the whole weights.
    """
    from torch.distributed.fsdp import FSDPModule

    own: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    config = copy.deepcopy(model.config)
    config.__dict__.pop("distributed_config", None)
    with torch.device("meta"):
        whole: PreTrainedModel = own(config)
    whole.load_state_dict(weights, assign=True)
    _copy_others(model, whole)
    whole.tie_weights()
    if model.can_generate():
        whole.generation_config = copy.deepcopy(model.generation_config)
    return whole.train(model.training)


def _copy_others(model: nn.Module, whole: nn.Module) -> None:
    """Copy the tensors that no state dict holds, which are whole in every process."""
    modules = dict(model.named_modules())
    for path, module in whole.named_modules():
        for tensors, others in ((module._buffers, modules[path]._buffers), (vars(module), vars(modules[path]))):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    tensors[name] = others[name].detach().cpu()


def run_in_first_process(function: Callable[[], Result]) -> Result:
    """Run something in the first process, while the others wait for what comes of it.

    Args:
        function: What to run; every process has to call this.

    Returns:
        Its result, in every process.

    Raises:
        Exception: What it raised, in the first process; a RuntimeError that says so in the others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return function()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_first_process():
        try:
            with _models_whole():
                outcome[0] = function()
        except BaseException as error:  # also an interrupt: the others would wait
            failure = error
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome)
    # Gloo's own threads let go of what was broadcast, and wait for Python for that: a process that ends meanwhile
    # waits for them for ever. In a barrier and a moment's sleep Python is free for them.
    dist.barrier()
    time.sleep(0.1)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"The first process failed: {outcome[1]}")
    return outcome[0]


@contextmanager
def _models_whole() -> Iterator[None]:
    """Load models whole, although DeepSpeed's stage 3 is in use, which takes them apart as they are loaded."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
