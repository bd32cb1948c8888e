"""An optimizer whose steps a `Slimmer` goes along with, in a loop of somebody's own: by the hooks of its steps."""

from __future__ import annotations

import inspect
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from torch.optim import Optimizer

from ..arguments import SlimConfig, find_teacher_fields
from ..compaction import refuse_other_sizes, refuse_other_units
from ..parallel import find_fixed_shapes, refuse_strategy
from ..structures import Structure, get_tensor
from .loaded_weights import WeightsHook
from .model_shape import ModelShape
from .plan import Plan, Settings

_KEPT_AS = "_hf_slim_slimmer"
"""Attribute of a model with the slimmer that is or was attached to its optimizer."""
_SOME = 3
"""How many names are told of many."""


class Attachable(ABC):
    """What an attached optimizer asks of a `Slimmer`; see there.

    Attributes:
        plan: What is removed, and when.
        shape: Which units the model has.
        step: Optimizer steps done.
    """

    plan: Plan
    shape: ModelShape
    step: int

    @property
    @abstractmethod
    def attached_to(self) -> Optimizer | None:
        """The optimizer that it is attached to."""

    @property
    @abstractmethod
    def has_reached_target(self) -> bool:
        """Whether the last pruning step of every target is done."""

    @property
    @abstractmethod
    def may_remove(self) -> bool:
        """Whether units leave the model in this training, as far as is known, or have left it."""

    @abstractmethod
    def settle(self, model: nn.Module, optimizer: Any, obstacle: str | None) -> None:
        """Take note of the optimizer, and of shapes that cannot change."""

    @abstractmethod
    def watch(self, model: nn.Module, step: int, called: nn.Module | None = None) -> None:
        """Keep the batch of a step, if it is needed."""

    @abstractmethod
    def score(self, model: nn.Module, step: int, *, may_be_skipped: bool, scale: torch.Tensor | None = None) -> None:
        """Score the units from the gradients of a step that is about to be taken."""

    @abstractmethod
    def advance(self, model: nn.Module, optimizer: Any, step: int, *, skipped: bool | torch.Tensor) -> None:
        """Drop units if it is time, and keep dropped ones out."""

    @abstractmethod
    def refuse_more_steps(self) -> None:
        """Refuse a step beyond the training."""

    @abstractmethod
    def refuse_missing_weights(self) -> None:
        """Refuse to go on with a state without its weights."""

    @abstractmethod
    def detach(self) -> None:
        """Let the optimizer step without this."""


class _Kept:
    """A slimmer, kept with the model; nothing is left of it in a copy or a pickle of the model."""

    def __init__(self, slimmer: Attachable) -> None:
        self.slimmer = slimmer

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class AttachedOptimizer:
    """Scores before every step of an optimizer, drops units after it, and watches for the batch of the next.

    Args:
        slimmer: The state of the training.
        called: The model as it is called: in whatever DDP or torch.compile has wrapped it.
        model: The model itself.
        optimizer: The optimizer that calls the hooks of its steps.

    Attributes:
        has_loaded: Whether weights were loaded since the last step, where units may leave the model.
    """

    def __init__(self, slimmer: Attachable, called: nn.Module, model: nn.Module, optimizer: Optimizer) -> None:
        """See the class."""
        self._slimmer, self._called, self._model = slimmer, called, model
        self._optimizer = weakref.ref(optimizer)
        self._is_ready = self._is_scored = self.has_loaded = self._has_loaded_state = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        if slimmer.may_remove:
            self._handles.append(model.register_load_state_dict_pre_hook(WeightsHook(self._take_sizes)))
        self.begin()

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, None if nobody else has it any more."""
        return self._optimizer()

    def begin(self) -> None:
        """Go on from the slimmer's state; weights and the optimizer's state may be loaded before the next step."""
        self._is_ready = False
        self._watch()

    def detach(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Score the units, with a closure as soon as that has made the gradients."""
        if _is_inside_step(optimizer):
            return None
        slimmer = self._slimmer
        slimmer.shape.refuse_unnamed()
        slimmer.shape.refuse_changed()
        slimmer.refuse_more_steps()
        if not self._is_ready:
            self._get_ready(optimizer)
        self._is_scored = slimmer.has_reached_target
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._is_scored or closure is None:
            self._score(optimizer)
            return None
        scoring = self._make_scoring(optimizer, closure)
        if len(args) > 1:
            return (args[0], scoring, *args[2:]), kwargs
        return args, {**kwargs, "closure": scoring}

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_inside_step(optimizer):
            return
        if not self._is_scored:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step has not called its closure, which makes the gradients that units "
                "are scored by. Compute the gradients before the step, or use slim_criterion='magnitude'."
            )
        slimmer = self._slimmer
        slimmer.step += 1
        self.has_loaded = False
        is_over = slimmer.has_reached_target
        skipped = True if is_over else _was_skipped(optimizer)
        slimmer.advance(self._model, optimizer, slimmer.step, skipped=skipped)
        self._watch()

    def _make_scoring(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        def scoring(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            self._score(optimizer)
            return loss

        return scoring

    def _score(self, optimizer: Optimizer) -> None:
        """Score the units once in a step, at the weights with which it begins."""
        if not self._is_scored:
            self._is_scored = True
            may_be_skipped = getattr(optimizer, "found_inf", None) is not None
            scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for those that divide by themselves
            step = self._slimmer.step + 1
            self._slimmer.score(self._model, step, may_be_skipped=may_be_skipped, scale=scale)

    def _get_ready(self, optimizer: Optimizer) -> None:
        """Look at the model and the optimizer as they are now that the first step comes."""
        slimmer = self._slimmer
        refuse_strategy(self._model)
        refuse_other_optimizer(self._model, slimmer.plan.structures, optimizer)
        if not self._has_loaded_state:
            refuse_other_sizes(optimizer)
        slimmer.refuse_missing_weights()
        refuse_other_units(
            optimizer, self._model, [slimmer.shape.find_current(s.name) for s in slimmer.plan.structures]
        )
        slimmer.settle(self._model, optimizer, find_fixed_shapes(self._called) or find_fixed_shapes(self._model))
        self._is_ready, self._has_loaded_state = True, False

    def _after_load(self, optimizer: Optimizer) -> None:
        """Look at a state that was loaded when the next step comes: the weights may be loaded after it."""
        self._has_loaded_state, self._is_ready = True, False

    def _take_sizes(self, weights: Mapping[str, Any], prefix: str) -> None:
        self.has_loaded = True
        self._slimmer.shape.take_sizes(self._model, weights, prefix)

    def _watch(self) -> None:
        """Look out for the batch of the next step; what is compiled is called in place of the model."""
        compiled = self._called if is_compiled_module(self._called) else None
        self._slimmer.watch(self._model, self._slimmer.step + 1, compiled)


def attach_optimizer(
    slimmer: Attachable, settings: Settings, called: nn.Module, model: nn.Module, optimizer: Any
) -> AttachedOptimizer:
    """Let a slimmer go along with an optimizer; see `Slimmer.attach`."""
    hooked = find_hooked(optimizer)
    refuse_attached(model)
    earlier = find_attached(model)
    if earlier is not None:
        earlier.detach()  # from an optimizer that is gone
    asked = find_teacher_fields(settings) if isinstance(settings, SlimConfig) else []
    if asked:
        raise ValueError(
            f"{', '.join(asked)} cannot be used with Slimmer.attach, which does not know the loss: train with "
            "SlimTrainer, or add the teacher's loss to yours and leave slim_teacher out."
        )
    if not slimmer.plan.targets:
        warnings.warn(
            "Slimmer has nothing to do: ffn2_sparsity and mha_sparsity are both 0, and no budget is given.",
            stacklevel=3,
        )
    refuse_other_optimizer(model, slimmer.plan.structures, hooked)
    slimmer.settle(model, hooked, find_fixed_shapes(called) or find_fixed_shapes(model))
    attached = AttachedOptimizer(slimmer, called, model, hooked)
    vars(model)[_KEPT_AS] = _Kept(slimmer)
    return attached


def find_attached(model: nn.Module) -> Attachable | None:
    """What is or was attached last to the optimizer of a model; a copy of the model has none."""
    kept = vars(model).get(_KEPT_AS)
    return kept.slimmer if isinstance(kept, _Kept) else None


def refuse_attached(model: nn.Module) -> None:
    """Refuse to slim a model that a slimmer in a loop slims already.

    Args:
        model: The model.

    Raises:
        ValueError: If one is attached to an optimizer that is still there.
    """
    slimmer = find_attached(model)
    optimizer = slimmer.attached_to if slimmer is not None else None
    if optimizer is not None:
        raise ValueError(
            f"A Slimmer is attached to {type(optimizer).__name__}, the optimizer of this model, already, and would "
            "drop units a second time: attach once, and leave SlimTrainerCallback out, or call detach() of it first."
        )


def find_hooked(optimizer: Any) -> Optimizer:
    """Find the optimizer that calls the hooks of its steps, in what wraps it.

    Args:
        optimizer: A torch optimizer, or what holds one as its `optimizer`, as wrappers of accelerate and Lightning do.

    Returns:
        The torch optimizer.

    Raises:
        ValueError: If there is none.
    """
    found = optimizer
    while not (isinstance(found, Optimizer) and hasattr(type(found).step, "hooked")):
        found = getattr(found, "optimizer", None)
        if found is None:
            raise ValueError(
                f"Slimmer.attach takes a torch.optim.Optimizer, whose step calls hooks, got {type(optimizer).__name__}"
                ". Pass the optimizer inside it; in a Trainer use SlimTrainerCallback."
            )
    return found


def refuse_other_optimizer(model: nn.Module, structures: Iterable[Structure], optimizer: Optimizer) -> None:
    """Refuse an optimizer that does not train all weights of the units that are to be dropped.

    Args:
        model: The model.
        structures: The structures that will lose units.
        optimizer: The optimizer.

    Raises:
        ValueError: If it trains none of them, or only some.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = dict.fromkeys(member.tensor for structure in structures for member in structure.members)
    trained = [name for name in names if get_tensor(model, name).requires_grad]
    missing = [name for name in trained if id(get_tensor(model, name)) not in held]
    if not missing:
        return
    told = ", ".join(missing[:_SOME]) + (f" and {len(missing) - _SOME} more" if len(missing) > _SOME else "")
    if len(missing) == len(trained):
        raise ValueError(
            f"{type(optimizer).__name__} belongs to another model: it has no weight that is to be slimmed ({told}) in "
            "its param_groups. Attach to the optimizer that was made with this model's parameters."
        )
    raise ValueError(
        f"{type(optimizer).__name__} has no {told} in its param_groups. Slimming follows one optimizer: train all "
        "weights of the layers that are slimmed with it, in several param_groups if they need different settings, or "
        "leave layers out with slim_exclude."
    )


def _is_inside_step(optimizer: Optimizer) -> bool:
    """Whether a step of a subclass has called that of its base class, which calls the same hooks."""
    code, depth = type(optimizer).step.__code__, 0
    frame = inspect.currentframe()
    while frame is not None and depth < 2:
        depth += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth > 1


def _was_skipped(optimizer: Optimizer) -> bool | torch.Tensor:
    """Whether gradients overflowed: GradScaler leaves it to fused optimizers to do nothing then."""
    found = getattr(optimizer, "found_inf", None)
    if not isinstance(found, torch.Tensor):
        return False
    return bool(found) if found.device.type == "cpu" else found.bool()
