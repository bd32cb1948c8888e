"""What structures cost: parameters, floating-point operations, measured time."""

from .budget_costs import find_costs
from .costs import BudgetReport, Costs
from .forward_costs import find_forward_costs, make_small_skeleton
from .skeleton import Kept
from .timing import time_alternately, time_call, without_bars
