"""What a model computes, on which inputs, and whether two models compute the same."""

from .higher_precision import widened
from .made_inputs import RUN_ERRORS, describe, evaluating, keeping_random_state, make_inputs
from .module_state import Snapshot
from .output_comparison import (
    HALF,
    Outputs,
    VerificationError,
    check_verify,
    compare_models,
    compare_outputs,
    compare_runs,
    compute_outputs,
    find_tensors,
    is_comparable,
)
from .output_differences import OutputDifference, measure_differences
