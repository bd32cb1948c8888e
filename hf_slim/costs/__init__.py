"""What structures cost: parameters, floating-point operations, measured time."""

from .budget_costs import find_costs
from .costs import BudgetReport, Costs
from .flop_costs import LENGTH, count_flop_costs, count_flops, make_batches
from .forward_costs import find_forward_costs, make_small_skeleton
from .model_parts import ModelPart, count_parts
from .parameter_costs import count_parameter_costs
from .skeleton import Kept, Skeleton, write_out
from .timing import time_alternately, time_call, without_bars
