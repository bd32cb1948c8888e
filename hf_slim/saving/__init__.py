"""What `save_slimmed` leaves: a folder written whole or not at all, its card, the report, the upload."""

from .atomic_folder import check_folder
from .card_facts import find_settings
from .figures import plot_training
from .hub_upload import add_hub_fields
from .layer_bars import StructureSize
from .past_slimming import keep_loaded, keep_slimming
from .published import push_slimmed, renew_card
from .remote_code import portable
from .replaced_report import replacing_report, upload_replacing
from .report import SlimReport, count_bytes, count_parameters, measure_latency, render_table, shorten
from .save import save_slimmed
