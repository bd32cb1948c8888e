"""What happens while a model trains: when how much is removed, which units, and how they leave.

`SlimTrainerCallback` is the door of the Trainer, `Slimmer` the state of one training behind it.
"""

from .attached_optimizer import refuse_attached
from .auto_slim_entries import parse_auto_slim_config
from .callback import SlimTrainerCallback, add_sparsities, refuse_several
from .captured_batch import find_entries
from .checkpoints import choose_checkpoint, find_whole_checkpoint, restore_shape
from .damaged_weight_files import find_damaged_weights
from .even_sizes import fit_evenly, size_evenly
from .importance import score_structures
from .model_shape import find_shape
from .plan import Plan, make_plan
from .schedule import Schedule
from .slimmer import Slimmer, find_slimmer
from .trainer_session import attending
from .unit_selection import check_reachable, multiple_of, select_units
