"""Where weights and gradients lie: in one process or in parts over many, on a device, in CPU memory or on disk."""

from .deepspeed_zero import whole_shape, whole_shapes
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
from .sharded_tensors import is_sharded
from .shards import Shards, find_shards
from .supported_strategies import find_fixed_shapes, refuse_strategy
from .tiles import take_positions
from .whole_tensors import Place, Zeros
