"""Makes transformer models smaller and faster while they are fine-tuned. Importing it lets slim models load."""

from .arguments import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments
from .compaction import model_slim
from .hooks import install_hooks
from .saving import SlimReport, save_slimmed
from .structures import Discovery, Member, Skipped, Structure, find_structures
from .training import SlimTrainerCallback, parse_auto_slim_config

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

install_hooks()
