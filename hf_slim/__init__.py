"""Makes transformer models smaller and faster while they are fine-tuned. Importing it lets slim models load."""

from .arguments import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments
from .auto_slim import model_slim, parse_auto_slim_config
from .callback import SlimTrainerCallback, install_log_hook
from .checkpoints import install_resume_hook
from .discovery import find_structures
from .loading import install_hook
from .report import SlimReport
from .saving import save_slimmed
from .structures import Discovery, Member, Skipped, Structure

__all__ = [
    "Discovery",
    "Member",
    "Skipped",
    "SlimArgumentsMixin",
    "SlimConfig",
    "SlimReport",
    "SlimSeq2SeqTrainingArguments",
    "SlimTrainerCallback",
    "SlimTrainingArguments",
    "Structure",
    "find_structures",
    "model_slim",
    "parse_auto_slim_config",
    "save_slimmed",
]

install_hook()
install_log_hook()
install_resume_hook()
