"""Makes transformer models smaller and faster while they are fine-tuned. Importing it lets slim models load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hooks import install_hooks

if TYPE_CHECKING:
    from .arguments import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments
    from .compaction import model_slim
    from .saving import SlimReport, save_slimmed
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
    from .training import SlimTrainerCallback, parse_auto_slim_config

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
    "SlimTrainerCallback",
    "SlimTrainingArguments",
    "Structure",
    "find_structures",
    "model_slim",
    "parse_auto_slim_config",
    "register_layout",
    "save_slimmed",
]

# Where the public names are. Each room is imported with the first use of one of its names: it brings PyTorch along.
_MODULES = {
    "arguments": ("SlimArgumentsMixin", "SlimConfig", "SlimSeq2SeqTrainingArguments", "SlimTrainingArguments"),
    "structures": (
        "Discovery",
        "FfnLayout",
        "Fused",
        "Member",
        "MhaLayout",
        "Skipped",
        "Structure",
        "find_structures",
        "register_layout",
    ),
    "compaction": ("model_slim",),
    "training": ("SlimTrainerCallback", "parse_auto_slim_config"),
    "saving": ("SlimReport", "save_slimmed"),
}

if not TYPE_CHECKING:  # a type checker knows the names from above, and that there are no others

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                globals()[name] = value = getattr(import_module(f".{module}", __name__), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install_hooks()
