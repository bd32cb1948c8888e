"""What `import hf_slim` adds to transformers and the Hub's client: functions here take the place of some methods.

Each is called with the method that was there, and with what that would be called with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import configuration_utils, generation, modeling_utils, trainer, trainer_callback

from .arguments import refuse_unused
from .compaction import forget_remote_code, refresh_record, refuse_other_sizes
from .distillation import refuse_untaught, remember_fresh
from .exports import refuse_other_groups
from .modeling_hf_slim import RECORD_KEY, resize
from .saving import keep_loaded, portable, replacing_report, upload_replacing
from .training import (
    SlimTrainerCallback,
    add_sparsities,
    attending,
    choose_checkpoint,
    find_damaged_weights,
    refuse_several,
    restore_shape,
)


def install_hooks() -> None:
    """Put the hooks in force: once, however often this is called."""
    model, handler = modeling_utils.PreTrainedModel, trainer_callback.CallbackHandler
    _install(model, "post_init", _finish_model)
    _install(model, "from_pretrained", _load_model)
    _install(model, "save_pretrained", _save_model)
    _install(configuration_utils.PreTrainedConfig, "save_pretrained", _save_config)
    _install(handler, "on_init_end", _begin_trainer)
    _install(handler, "on_train_begin", _begin_training)
    _install(handler, "on_log", _report_log)
    _install(trainer.Trainer, "train", _train)
    _install(trainer.Trainer, "push_to_hub", _push_trained)
    _install(trainer.Trainer, "_push_from_checkpoint", _push_trained)
    _install(HfApi, "upload_folder", upload_replacing)
    _install(generation.ContinuousMixin, "init_continuous_batching", _begin_batching)


def _finish_model(finish: Callable[..., None], model: Any, /) -> None:
    """Give a model that has been built the sizes that its config records."""
    finish(model)
    if RECORD_KEY in model.config.__dict__:
        resize(model, is_whole=_is_stock(model))
        forget_remote_code(model.config)


def _load_model(
    load: Callable[..., Any], cls: Any, /, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """Load a model, resized also where code of somebody else's builds parts of it late; name a damaged weight file.

    It keeps what `save_slimmed` wrote beside it.
    """
    try:
        loaded = load(cls, pretrained_model_name_or_path, *args, **kwargs)
    except SafetensorError as error:
        damaged = [path for path, _ in find_damaged_weights(str(pretrained_model_name_or_path))]
        names = ", ".join(map(str, damaged)) or f"A weight file of {pretrained_model_name_or_path}"
        raise SafetensorError(f"{names} is damaged: {error}. Save or download the model again.") from error
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if RECORD_KEY in model.config.__dict__ and not _is_stock(model):
        resize(model)  # which finds everything done, or a name that is nowhere in it
    remember_fresh(model)
    keep_loaded(model, pretrained_model_name_or_path)
    return loaded


def _save_model(save: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Save a model, its sizes recorded in its config."""
    refresh_record(model)
    return save(model, *args, **kwargs)


def _save_config(save: Callable[..., Any], config: Any, /, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Save a config, that of a slim model with what loads the model where hf_slim is not installed."""
    return save(portable(config, save_directory), save_directory, *args, **kwargs)


def _begin_trainer(begin: Callable[..., Any], handler: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Refuse a trainer with two `SlimTrainerCallback`, each of which would not know of the other."""
    refuse_several(handler.callbacks)
    return begin(handler, *args, **kwargs)


def _begin_training(begin: Callable[..., Any], handler: Any, /, args: Any, state: Any, control: Any) -> Any:
    """Refuse a training that asks for a sparsity without one `SlimTrainerCallback`: nothing would be removed.

    Nor would a teacher be asked by a trainer that knows of none, although the checkpoint was made with one.

    This holds for whatever calls callbacks, also where a class has a `train` of its own, and for the arguments of
    every trial of a hyperparameter search.
    """
    refuse_several(handler.callbacks)
    if not _is_slimming(handler):
        refuse_unused(args)
    refuse_untaught(args, handler.callbacks, state)
    return begin(handler, args, state, control)


def _report_log(report: Callable[..., Any], handler: Any, /, args: Any, state: Any, control: Any, logs: Any) -> Any:
    """Add the sparsities to what is logged before reporters such as TensorBoard see it: those come before ours."""
    add_sparsities(handler.callbacks, state, logs)
    return report(handler, args, state, control, logs)


def _train(run: Callable[..., Any], own: Any, /, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Train; with a `SlimTrainerCallback`, resume from whole checkpoints only, the model in their shape."""
    refuse_other_sizes(own.optimizer)
    if not _is_slimming(own.callback_handler):
        return run(own, resume_from_checkpoint, *args, **kwargs)
    load = own._load_from_checkpoint  # which classes of other packages have their own of

    def load_from_checkpoint(folder: str, model: Any = None, **keywords: Any) -> None:
        restore_shape(own.model if model is None else model, folder, own.args)
        load(folder, **keywords) if model is None else load(folder, model, **keywords)

    own._load_from_checkpoint = load_from_checkpoint
    try:
        resume_from_checkpoint = choose_checkpoint(resume_from_checkpoint, own.args.output_dir)
        with attending(own):
            return run(own, resume_from_checkpoint, *args, **kwargs)
    finally:
        del own._load_from_checkpoint


def _begin_batching(begin: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Refuse continuous batching of a model whose layers do not all have the key-value heads that its config says."""
    refuse_other_groups(model)
    return begin(model, *args, **kwargs)


def _push_trained(push: Callable[..., Any], own: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Push a trainer's folder; what is on the Hub of a slim model that was there before goes with its weights."""
    with replacing_report():
        return push(own, *args, **kwargs)


def _install(owner: type, name: str, hook: Callable[..., Any]) -> None:
    """Let a hook take the place of a method."""
    method = owner.__dict__[name]
    original = getattr(method, "__func__", method)
    if hasattr(original, "of_hf_slim"):
        return

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    hooked.__dict__["of_hf_slim"] = True
    setattr(owner, name, classmethod(hooked) if isinstance(method, classmethod) else hooked)


def _is_slimming(handler: Any) -> bool:
    return any(isinstance(callback, SlimTrainerCallback) for callback in handler.callbacks)


def _is_stock(model: Any) -> bool:
    """Whether a model is of a class of transformers, which is whole when its `post_init` is called."""
    return type(model).__module__.startswith("transformers.")
