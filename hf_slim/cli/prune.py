"""`hf-slim prune`: slim a model in one shot, calibrated on a file, and save it."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ..arguments import SlimConfig
from ..one_shot import MethodName, slim
from ..saving import SlimReport, check_folder, save_slimmed
from .data import DataArguments, load_text_data
from .model_source import check_place, check_text_model, load_config, load_weights
from .sequences import check_length, find_collator, tokenize
from .tokenizer import fit_tokenizer, load_tokenizer


@dataclass
class PruneArguments:
    """Which model is slimmed in one shot, how, and where it goes."""

    model_name_or_path: str = field(metadata={"help": "Trained model to slim: a Hub name, or a folder with weights."})
    output_dir: str = field(metadata={"help": "Folder for the slim model and its tokenizer."})
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer: a Hub name, a folder, or a WordPiece vocabulary (.txt). Default: the model's."},
    )
    method: MethodName = field(
        default="obs",
        metadata={"help": "What decides which units go; only obs changes the weights that stay to make up for them."},
    )
    num_calibration_samples: int = field(
        default=512, metadata={"help": "Rows of the training file (for causal-lm sequences) to calibrate on."}
    )
    batch_size: int = field(default=8, metadata={"help": "Samples of a forward pass."})
    seed: int = field(default=42, metadata={"help": "Decides which rows are taken."})


def prune(arguments: PruneArguments, data_arguments: DataArguments, config: SlimConfig) -> SlimReport:
    """Slim a trained model in one shot and save it with its tokenizer.

    Args:
        arguments: The model, the method and the folder.
        data_arguments: What to calibrate on.
        config: How much to remove.

    Returns:
        The sizes before and after.

    Raises:
        ValueError: If an argument, a file or a column is missing or does not fit; nothing is written then.
    """
    folder = check_folder(arguments.output_dir)
    for flag in ("model_name_or_path", "tokenizer_name"):
        check_place(f"--{flag}", getattr(arguments, flag))
    rows = load_text_data(data_arguments, seed=arguments.seed)
    source = arguments.model_name_or_path
    found = load_config(source, trust_remote_code=None)
    check_text_model(found, source, data_arguments, rows.task)
    tokenizer = load_tokenizer(arguments.tokenizer_name or source)
    fit_tokenizer(tokenizer, found, arguments.tokenizer_name or source, source, pads=rows.task != "causal-lm")
    check_length(found, tokenizer, data_arguments.max_seq_length)
    kind = AutoModelForCausalLM if rows.task == "causal-lm" else AutoModelForSequenceClassification
    model = load_weights(kind, source)
    slim(
        model,
        tokenize(rows, rows.train, tokenizer, data_arguments.max_seq_length).shuffle(seed=arguments.seed),
        config,
        num_calibration_samples=arguments.num_calibration_samples,
        batch_size=arguments.batch_size,
        data_collator=find_collator(rows.task, tokenizer),
        method=arguments.method,
    )
    return save_slimmed(model, folder, processing_class=tokenizer)
