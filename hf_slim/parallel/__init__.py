"""Where weights and gradients lie: in one process or in parts over many, on a device, in CPU memory or on disk."""

from .deepspeed_zero import (
    call_before_step,
    clip_factor,
    find_zero_optimizer,
    sum_places,
    whole_shape,
    whole_shapes,
    write_zeros_everywhere,
)
from .gathering import build_whole, gather_weights, is_first_process, is_spread, run_in_first_process
from .offloaded_weights import (
    change_tensor,
    check_values,
    find_device,
    is_dispatched,
    is_offloaded,
    read_tensor,
    refuse_unmapped,
    share_tensors,
    writing_apart,
)
from .sharded_tensors import find_begin, find_local, is_sharded, sum_over_shards
from .supported_strategies import find_fixed_shapes, refuse_strategy
from .tiles import find_nonzero, sum_tiles, take_positions

__all__ = [
    "build_whole",
    "call_before_step",
    "change_tensor",
    "check_values",
    "clip_factor",
    "find_begin",
    "find_device",
    "find_fixed_shapes",
    "find_local",
    "find_nonzero",
    "find_zero_optimizer",
    "gather_weights",
    "is_dispatched",
    "is_first_process",
    "is_offloaded",
    "is_sharded",
    "is_spread",
    "read_tensor",
    "refuse_strategy",
    "refuse_unmapped",
    "run_in_first_process",
    "share_tensors",
    "sum_over_shards",
    "sum_places",
    "sum_tiles",
    "take_positions",
    "whole_shape",
    "whole_shapes",
    "write_zeros_everywhere",
    "writing_apart",
]
