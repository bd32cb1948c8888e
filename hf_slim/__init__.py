"""Makes transformer models smaller and faster while they are fine-tuned. Importing it lets slim models load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .hooks import install_hooks

if TYPE_CHECKING:
    from .arguments import SlimArgumentsMixin, SlimConfig, SlimSeq2SeqTrainingArguments, SlimTrainingArguments
    from .auto_slim import model_slim, parse_auto_slim_config
    from .callback import SlimTrainerCallback
    from .discovery import find_structures
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

# Where the public names are. Each module is imported with the first use of one of its names: it brings PyTorch along.
_MODULES = {
    "arguments": ("SlimArgumentsMixin", "SlimConfig", "SlimSeq2SeqTrainingArguments", "SlimTrainingArguments"),
    "auto_slim": ("model_slim", "parse_auto_slim_config"),
    "callback": ("SlimTrainerCallback",),
    "discovery": ("find_structures",),
    "report": ("SlimReport",),
    "saving": ("save_slimmed",),
    "structures": ("Discovery", "Member", "Skipped", "Structure"),
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
