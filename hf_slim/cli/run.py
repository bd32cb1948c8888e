"""The recipe of `hf-slim run`: train dense and slimmed under the same settings, and compare."""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from ..arguments import TEACHER_FIELDS, SlimConfig, SlimTrainingArguments, check_whole
from ..distillation import SlimTrainer
from ..saving import (
    add_hub_fields,
    count_bytes,
    count_parameters,
    measure_latency,
    push_slimmed,
    renew_card,
    save_slimmed,
)
from ..structures import find_structures
from ..training import SlimTrainerCallback, find_shape, find_whole_checkpoint, make_plan
from .comparison import Comparison, ModelFigures
from .data import DataArguments, Task, TextData, load_text_data
from .model_source import check_place, check_text_model, load_config, load_weights
from .sequences import check_length, find_collator, tokenize
from .start import Start
from .task_metrics import evaluate_task as _evaluate
from .task_metrics import make_compute_metrics
from .tokenizer import fit_tokenizer, has_tokenizer, load_tokenizer, make_byte_tokenizer, pad


@dataclass
class ModelArguments:
    """Where the model comes from: weights, or a config for a fresh one."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to fine-tune: a Hub name, or a folder with weights."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Config of a fresh model to train from scratch: a Hub name, a folder or a .json file."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer: a Hub name, a folder, or a WordPiece vocabulary (.txt). Default: the model's; for a "
            "fresh causal-lm that has none, single bytes."
        },
    )

    @property
    def source(self) -> str:
        """What the config is read from."""
        return self.model_name_or_path or self.config_name or ""


@dataclass(frozen=True)
class _Setup:
    """What the dense and the slimmed training have in common."""

    task: Task
    config: Any
    weights: str | None
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset


def run(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: SlimTrainingArguments,
    start: Start,
) -> Comparison:
    """Train a model slimmed and then dense, save the slim one, and compare them.

    With `slim_teacher="dense"` the dense one is trained first, and the slimmed one learns from it.

    Both trainings start from the same weights and take the same seed, data order and number of steps. Their
    checkpoints go to `slimmed` and `dense` in the output folder, the slim model to `slim`, the figures to
    `comparison.json`. With `resume_from_checkpoint=true` each training goes on from its last checkpoint.

    Args:
        model_arguments: Where the model comes from.
        data_arguments: What to train and evaluate on.
        training_arguments: How to train and how much to remove.
        start: Is over with the first step of a training.

    Returns:
        The figures of the dense, the masked and the slimmed model; none of a masked one if dropped units left the
        model while it trained (`slim_live`).

    Raises:
        ValueError: If an argument, a file or a column is missing or does not fit; before any training.
    """
    _check_arguments(model_arguments, training_arguments)
    with training_arguments.main_process_first(desc="data"):
        setup = _prepare(model_arguments, data_arguments, training_arguments.seed)
    output_dir = Path(training_arguments.output_dir)
    slim_model = output_dir / "slim"

    # The slimmed training comes first, since it can refuse its settings; the dense one has none to refuse.
    dense = None
    if training_arguments.slim_teacher == "dense":
        _check_plan(setup, training_arguments)
        dense = _train_dense(setup, training_arguments, 1, start)
    teacher = None if dense is None else dense.model
    trainer = _make_slim_trainer(setup, training_arguments, _make_model(setup, training_arguments), teacher)
    _train(trainer, 1 if dense is None else 2, start)
    metrics, models = {}, {}
    if find_shape(trainer.model) is None:
        metrics["masked"], models["masked"] = _evaluate(trainer, setup.task), trainer.model
    save_slimmed(trainer, slim_model)
    trainer.accelerator.wait_for_everyone()
    loaded = _auto_class(setup.task).from_pretrained(slim_model)
    trainer = _make_trainer(setup, training_arguments, "slimmed", loaded)
    metrics["slimmed"], models["slimmed"] = _evaluate(trainer, setup.task), trainer.model

    trainer = dense or _train_dense(setup, training_arguments, 2, start)
    metrics["dense"], models["dense"] = _evaluate(trainer, setup.task), trainer.model

    batch = dict(next(iter(trainer.get_eval_dataloader())))
    batch.pop("labels")
    latency = measure_latency(models, batch)
    figures = {
        name: ModelFigures(metrics[name], count_parameters(model), count_bytes(model), latency[name])
        for name, model in models.items()
    }
    comparison = Comparison(figures["dense"], figures.get("masked"), figures["slimmed"], str(slim_model), setup.task)
    if training_arguments.process_index == 0:
        comparison.save(output_dir / "comparison.json")
        _publish(slim_model, training_arguments, metrics["slimmed"], metrics["dense"])
    return comparison


def _publish(folder: Path, arguments: SlimTrainingArguments, slim: dict[str, float], dense: dict[str, float]) -> None:
    """Tell the card how good the dense model is, and upload the folder if that is asked for."""
    metrics, before = ({f"eval_{name}": value for name, value in found.items()} for found in (slim, dense))
    renew_card(folder, metrics=metrics, metrics_before=before)
    if arguments.push_to_hub:
        repo_id = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
        push_slimmed(folder, repo_id, **add_hub_fields({}, arguments))


def _check_arguments(model: ModelArguments, training: SlimTrainingArguments) -> None:
    if (model.model_name_or_path is None) == (model.config_name is None):
        raise ValueError(
            "Give one of --model_name_or_path (a model to fine-tune) and --config_name (a fresh model), got "
            f"{'both' if model.config_name else 'neither'}."
        )
    for flag, name in vars(model).items():
        check_place(f"--{flag}", name)
    for flag in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_whole(f"--{flag}", getattr(training, flag))
    if training.push_to_hub and training.hub_model_id is not None:
        validate_repo_id(training.hub_model_id)
    if training.resume_from_checkpoint and str(training.resume_from_checkpoint).lower() != "true":
        raise ValueError(
            f"--resume_from_checkpoint must be true, got {training.resume_from_checkpoint!r}: there are two "
            "trainings, and each goes on from the last checkpoint in its own folder."
        )
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be made: {error}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} is not writable; name another folder.")


def _prepare(model: ModelArguments, data: DataArguments, seed: int) -> _Setup:
    rows = load_text_data(data, seed=seed)
    config = load_config(model.source, trust_remote_code=None)
    check_text_model(config, model.source, data, rows.task)
    if rows.task != "causal-lm":
        _set_outputs(config, rows)
    tokenizer, is_made = _find_tokenizer(model, rows.task)
    _fit(config, tokenizer, model, is_made=is_made)
    tokenizer.model_max_length = check_length(config, tokenizer, data.max_seq_length)
    train, validation = (
        tokenize(rows, part, tokenizer, data.max_seq_length) for part in (rows.train, rows.validation)
    )
    return _Setup(rows.task, config, model.model_name_or_path, tokenizer, train, validation)


def _find_tokenizer(model: ModelArguments, task: Task) -> tuple[PreTrainedTokenizerBase, bool]:
    """The tokenizer, and whether it was made for this run."""
    if model.tokenizer_name is not None:
        return load_tokenizer(model.tokenizer_name), False
    if has_tokenizer(model.source):
        return load_tokenizer(model.source), False
    if task == "causal-lm" and model.config_name is not None:
        return make_byte_tokenizer(), True
    raise ValueError(f"There is no tokenizer in {model.source}: name one by --tokenizer_name.")


def _set_outputs(config: PreTrainedConfig, rows: TextData) -> None:
    """Give a config the outputs of a task with labels; transformers tells their number by that of the names."""
    config.id2label = dict(enumerate(rows.classes if rows.task == "classification" else ["LABEL_0"]))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "regression" if rows.task == "regression" else "single_label_classification"


def _fit(config: Any, tokenizer: PreTrainedTokenizerBase, model: ModelArguments, *, is_made: bool) -> None:
    """Make the config of a fresh model fit the tokenizer; refuse a tokenizer that does not fit the weights."""
    named, text_config = model.tokenizer_name or model.source, config.get_text_config()
    if model.config_name is None:
        fit_tokenizer(tokenizer, config, named, model.source, pads=True)
    else:
        pad(tokenizer, named)
        if is_made or len(tokenizer) > text_config.vocab_size:
            text_config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is not None:
                setattr(text_config, name, getattr(tokenizer, name))
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id


def _auto_class(task: Task) -> Any:
    return AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification


def _make_model(setup: _Setup, arguments: SlimTrainingArguments) -> PreTrainedModel:
    set_seed(arguments.seed)
    config = copy.deepcopy(setup.config)
    if setup.weights is None:
        return _auto_class(setup.task).from_config(config)
    return load_weights(_auto_class(setup.task), setup.weights, config=config)


def _make_trainer(setup: _Setup, arguments: SlimTrainingArguments, part: str, model: PreTrainedModel) -> Trainer:
    own = copy.copy(arguments)
    own.ffn2_sparsity = own.mha_sparsity = 0.0
    own.slim_target_params = own.slim_target_flops = own.slim_target_latency = None
    for name in TEACHER_FIELDS:
        setattr(own, name, getattr(SlimConfig(), name))
    return _log_to_its_folder(Trainer(model, **_common(setup, own, part)))


def _check_plan(setup: _Setup, arguments: SlimTrainingArguments) -> None:
    """Refuse settings before the dense training that the slimmed one would refuse after it."""
    model = _make_model(setup, arguments)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = math.ceil(math.ceil(len(setup.train) / batch) * arguments.num_train_epochs)
    if arguments.max_steps > 0:
        steps = arguments.max_steps
    make_plan(model, SlimConfig.from_arguments(arguments), steps, found=find_structures(model))


def _log_to_its_folder(trainer: Trainer) -> Trainer:
    """Have a trainer log to its output folder; else one that only evaluates does to the current folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(Path(trainer.args.output_dir, "runs", time.strftime("%Y%m%d-%H%M%S")))
    return trainer


def _make_slim_trainer(
    setup: _Setup, arguments: SlimTrainingArguments, model: PreTrainedModel, teacher: PreTrainedModel | None
) -> Trainer:
    own = copy.copy(arguments)
    if teacher is not None:
        own.slim_teacher = None
    common = _common(setup, own, "slimmed")
    return _log_to_its_folder(SlimTrainer(model, teacher_model=teacher, callbacks=[SlimTrainerCallback()], **common))


def _common(setup: _Setup, own: SlimTrainingArguments, part: str) -> dict[str, Any]:
    """What the trainers have in common, with arguments of their own."""
    own.output_dir = str(Path(own.output_dir) / part)
    own.push_to_hub = False  # what is pushed is the slim model
    return {
        "args": own,
        "train_dataset": setup.train,
        "eval_dataset": setup.validation,
        "processing_class": setup.tokenizer,
        "data_collator": find_collator(setup.task, setup.tokenizer),
        "compute_metrics": make_compute_metrics(setup.task),
    }


def _train_dense(setup: _Setup, arguments: SlimTrainingArguments, number: int, start: Start) -> Trainer:
    trainer = _make_trainer(setup, arguments, "dense", _make_model(setup, arguments))
    _train(trainer, number, start)
    return trainer


def _train(trainer: Trainer, number: int, start: Start) -> None:
    folder = trainer.args.output_dir
    if trainer.is_world_process_zero():
        print(f"Training {number} of 2: {Path(folder).name}", flush=True)
    has_begun = os.path.isdir(folder) and get_last_checkpoint(folder) is not None
    resume = find_whole_checkpoint(folder) if trainer.args.resume_from_checkpoint and has_begun else None
    trainer.add_callback(start)
    trainer.train(resume_from_checkpoint=resume)
    start.end()  # a training that was over is resumed without a step
