"""Units out of a model: what is zero is found, cut, recorded in the config and proven, or put back."""

from .compact import compact_model, round_up
from .config_fields import record_shapes
from .cuttings import Cuttings
from .optimizer_state import Slices, find_state_slices, has_state, refuse_other_sizes, zero_state
from .proven_removal import find_proof, find_removable, merge_proven, name_unproven, remove_units
from .shape_record import (
    REMOTE_MODULE,
    find_auto_classes,
    find_pretrained,
    find_stock_class,
    forget_remote_code,
    has_record,
    has_remote_code,
    make_auto_map,
    own_configs,
    refresh_record,
)
from .sparse_model import model_slim
from .zeros import find_zero_units, find_zeros, zero_units

__all__ = [
    "Cuttings",
    "REMOTE_MODULE",
    "Slices",
    "compact_model",
    "find_auto_classes",
    "find_pretrained",
    "find_proof",
    "find_removable",
    "find_state_slices",
    "find_stock_class",
    "find_zero_units",
    "find_zeros",
    "forget_remote_code",
    "has_record",
    "has_remote_code",
    "has_state",
    "make_auto_map",
    "merge_proven",
    "model_slim",
    "name_unproven",
    "own_configs",
    "record_shapes",
    "refresh_record",
    "refuse_other_sizes",
    "remove_units",
    "round_up",
    "zero_state",
    "zero_units",
]
