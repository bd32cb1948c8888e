"""Makes transformer models smaller and faster while they are fine-tuned. Importing it lets slim models load."""

from .arguments import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments
from .compaction import model_slim
from .distillation import SlimTrainer, SlimTrainerMixin
from .exports import export_gguf
from .hooks import install_hooks
from .one_shot import slim
from .saving import SlimReport, plot_training, push_slimmed, renew_card, save_slimmed
from .structures import (
    Discovery,
    FfnLayout,
    Fused,
    Member,
    MhaLayout,
    Skipped,
    Structure,
    find_structures,
    register_layout,
)
from .training import Slimmer, SlimTrainerCallback, parse_auto_slim_config

__all__ = [
    "Discovery",
    "FfnLayout",
    "Fused",
    "Member",
    "MhaLayout",
    "Skipped",
    "SlimArgumentsMixin",
    "SlimConfig",
    "SlimReport",
    "SlimSeq2SeqTrainingArguments",
    "SlimTrainer",
    "SlimTrainerCallback",
    "SlimTrainerMixin",
    "SlimTrainingArguments",
    "Slimmer",
    "Structure",
    "export_gguf",
    "find_structures",
    "model_slim",
    "parse_auto_slim_config",
    "plot_training",
    "push_slimmed",
    "register_layout",
    "renew_card",
    "save_slimmed",
    "slim",
]

install_hooks()
