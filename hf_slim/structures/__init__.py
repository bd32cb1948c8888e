"""What a model is made of: coupled layers that shrink together, found in any model.

`projection_names` is the table of what modules are called in transformers; `find_structures` is the way in.
What the table does not settle, since code is not of transformers, `custom_code` tries and reads.
"""

from .discovery import exclude_structures, find_structures, require_structures
from .layout_rows import FfnLayout, Fused, MhaLayout
from .linear_layers import BASE, find_tensor, join
from .peft_adapters import REMEDY, has_adapters, merge_adapters
from .projection_names import CONFIG_CHANNELS, CONFIG_HEADS, register_layout
from .structure import (
    Discovery,
    Kind,
    Masks,
    Member,
    Skipped,
    Structure,
    count_left,
    get_module,
    get_tensor,
    total_units,
)
from .structure_groups import SkippedGroup, StructureGroup, group_by_place, group_skipped, name_range
from .unit_counts import set_count
