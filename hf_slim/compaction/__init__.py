"""Units out of a model: what is zero is found, cut, recorded in the config and proven, or put back."""

from .config_record import (
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
from .cut_tensors import compact_model, grow_tensors, round_up
from .dense_model import DenseModel, find_dense, find_unproven, mark_unproven
from .module_copies import copy_modules
from .numerical_proof import find_blamed
from .optimizer_state import Slices, find_state_slices, has_state, refuse_other_sizes, refuse_other_units, zero_state
from .proven_removal import find_proof, find_removable, merge_proven, name_unproven, remove_units
from .saved_form import Form, cut_copy, find_form
from .sparse_model import model_slim
from .stock_config_fields import record_shapes
from .undo import Undo
from .zeros import find_zero_units, find_zeros, zero_units
