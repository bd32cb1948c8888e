"""The settings: their fields, their ranges, and where the pruning steps lie."""

from .budgets import BUDGET_CRITERION, Budget, find_asked, read_budget
from .choices import CriterionName, LiveChoice, ScopeName
from .doubled_settings import find_teacher_fields, refuse_two_settings, refuse_unused
from .pruning_steps import place_steps
from .range_checks import check_settings, check_whole
from .slim_fields import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments
from .teacher_checks import TEACHER_FIELDS
