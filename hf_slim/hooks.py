"""What `import hf_slim` adds to transformers: at once to modules that are imported already, to others once they are.

Nothing heavy is imported before it is needed, so that `import hf_slim` costs next to nothing.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_KEY = "hf_slim"
"""The key of the shape record in a config, as `modeling_hf_slim` has it."""


def install_hooks() -> None:
    """Put the hooks of `HOOKS` in force; once, however often it is called."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, hook in HOOKS.items():
        if sys.modules.get(name) is not None:
            hook(importlib.import_module(name))  # which waits where another thread is importing it


def hook_models(module: ModuleType) -> None:
    """Make every transformers model take the sizes that its config records, and record them when it is saved.

    A weight file that is damaged is named when it is loaded.

    Args:
        module: `transformers.modeling_utils`.
    """
    from safetensors import SafetensorError

    model_class = module.PreTrainedModel
    build, load = model_class.post_init, model_class.from_pretrained.__func__
    save = model_class.save_pretrained
    if _is_hook(build):
        return

    @functools.wraps(build)
    def post_init(self: Any) -> None:
        build(self)
        if _KEY in self.config.__dict__:
            from .compaction import forget_remote_code
            from .modeling_hf_slim import resize

            resize(self, is_whole=_is_stock(self))
            forget_remote_code(self.config)

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            loaded = load(cls, pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            from .training import find_damaged_weights

            damaged = [path for path, _ in find_damaged_weights(str(pretrained_model_name_or_path))]
            names = ", ".join(map(str, damaged)) or f"A weight file of {pretrained_model_name_or_path}"
            raise SafetensorError(f"{names} is damaged: {error}. Save or download the model again.") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if _KEY in model.config.__dict__ and not _is_stock(model):
            from .modeling_hf_slim import resize

            resize(model)  # which finds everything done, or a name that is nowhere in it
        return loaded

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_slim_models():
            from .compaction import refresh_record

            refresh_record(self)
        return save(self, *args, **kwargs)

    model_class.post_init = _mark(post_init)
    model_class.from_pretrained = classmethod(_mark(from_pretrained))
    model_class.save_pretrained = _mark(save_pretrained)


def hook_configs(module: ModuleType) -> None:
    """Make the config of a slim model take along what loads the model where hf_slim is not installed.

    Args:
        module: `transformers.configuration_utils`.
    """
    config_class = module.PreTrainedConfig
    save = config_class.save_pretrained
    if _is_hook(save):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_slim_models() or "auto_map" in self.__dict__:
            from .saving import portable

            self = portable(self, save_directory)
        return save(self, save_directory, *args, **kwargs)

    config_class.save_pretrained = _mark(save_pretrained)


def hook_callbacks(module: ModuleType) -> None:
    """Do what a callback cannot do by itself, where the Trainer calls all of its callbacks.

    The sparsities are added to what is logged before reporters such as TensorBoard see it, which come first in the
    Trainer's list. A training that asks for a sparsity has one `SlimTrainerCallback`: without it nothing of ours would
    run, and each of two does not know of the other. This holds for whatever calls callbacks, also where a class has a
    `train` of its own, and for the arguments of every trial of a hyperparameter search.

    Args:
        module: `transformers.trainer_callback`.
    """
    handler_class = module.CallbackHandler
    report, prepare, begin = handler_class.on_log, handler_class.on_init_end, handler_class.on_train_begin
    if _is_hook(report):
        return

    @functools.wraps(report)
    def on_log(self: Any, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> Any:
        if _is_slimming(self.callbacks):
            from .training import add_sparsities

            add_sparsities(self.callbacks, state, logs)
        return report(self, args, state, control, logs)

    @functools.wraps(prepare)
    def on_init_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_several(self.callbacks)
        return prepare(self, *args, **kwargs)

    @functools.wraps(begin)
    def on_train_begin(self: Any, args: Any, *others: Any, **kwargs: Any) -> Any:
        _refuse_several(self.callbacks)
        if not _is_slimming(self.callbacks) and f"{__package__}.arguments" in sys.modules:
            from .arguments import refuse_unused

            refuse_unused(args)
        return begin(self, args, *others, **kwargs)

    handler_class.on_log = _mark(on_log)
    handler_class.on_init_end = _mark(on_init_end)
    handler_class.on_train_begin = _mark(on_train_begin)


def hook_training(module: ModuleType) -> None:
    """Make a Trainer with a `SlimTrainerCallback` resume from whole checkpoints only, its model in their shape.

    Args:
        module: `transformers.trainer`.
    """
    trainer_class = module.Trainer
    run = trainer_class.train
    if _is_hook(run):
        return

    @functools.wraps(run)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _has_slim_models():
            from .compaction import refuse_other_sizes

            refuse_other_sizes(self.optimizer)
        if not _is_slimming(self.callback_handler.callbacks):
            return run(self, resume_from_checkpoint, *args, **kwargs)
        from .training import attending, choose_checkpoint, restore_shape

        load = self._load_from_checkpoint  # which classes of other packages have their own of

        def load_from_checkpoint(folder: str, model: Any = None, **keywords: Any) -> None:
            restore_shape(self.model if model is None else model, folder, self.args)
            load(folder, **keywords) if model is None else load(folder, model, **keywords)

        self._load_from_checkpoint = load_from_checkpoint
        try:
            resume_from_checkpoint = choose_checkpoint(resume_from_checkpoint, self.args.output_dir)
            with attending(self):
                return run(self, resume_from_checkpoint, *args, **kwargs)
        finally:
            del self._load_from_checkpoint

    trainer_class.train = _mark(train)


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.configuration_utils": hook_configs,
    "transformers.modeling_utils": hook_models,
    "transformers.trainer_callback": hook_callbacks,
    "transformers.trainer": hook_training,
}
"""For each module of transformers what is done to it after its import, and again after a reload."""


class _Finder:
    """Finds the modules of `HOOKS` as the finders after it do, and has their hooks run at the end of their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in HOOKS:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """A module's own loader, which also runs the module's hook."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also where `copy` makes one without a loader yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, which is left with its own loader, and hook it."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        HOOKS[module.__spec__.name](module)


def _is_slimming(callbacks: Iterable[Any]) -> bool:
    """Whether there is a `SlimTrainerCallback` among the callbacks; there is none before its module is imported."""
    slimming = getattr(sys.modules.get(f"{__package__}.training.callback"), "SlimTrainerCallback", ())
    return any(isinstance(callback, slimming) for callback in callbacks)


def _has_slim_models() -> bool:
    """Whether there may be a slim model: none is made or loaded without this module."""
    return f"{__package__}.modeling_hf_slim" in sys.modules


def _refuse_several(callbacks: Iterable[Any]) -> None:
    if _is_slimming(callbacks):
        from .training import refuse_several

        refuse_several(callbacks)


def _is_stock(model: Any) -> bool:
    """Whether a model is of a class of transformers, which is whole when its `post_init` is called."""
    return type(model).__module__.startswith("transformers.")


def _mark(hook: Callable[..., Any]) -> Callable[..., Any]:
    hook.__dict__["of_hf_slim"] = True
    return hook


def _is_hook(function: Any) -> bool:
    return getattr(function, "of_hf_slim", False)
