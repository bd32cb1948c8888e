"""What `save_slimmed` leaves: a folder written whole or not at all, its card, the report, the upload."""

from .atomic_folder import check_folder
from .hub_upload import check_keywords, push_folder
from .model_card import rename_in_card, write_model_card
from .model_folder import write_folder
from .remote_code import portable
from .report import SlimReport, StructureSize, count_bytes, count_parameters, measure_latency, render_table, shorten
from .save import save_slimmed
from .ways_out import WayOut, find_ways_out
