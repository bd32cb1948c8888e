"""Compaction in the middle of a training that proves itself on the batch at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..compaction import Undo, compact_model, find_blamed, zero_units
from ..parallel import find_device
from ..proof import RUN_ERRORS, VerificationError, compare_outputs, evaluating, find_tensors, widened
from ..structures import Masks, Structure, get_module
from .captured_batch import Call


class Proof(NamedTuple):
    """What a compaction left.

    Args:
        structures: The structures as they are now, in the order that was given.
        reached: Names of those of their output weights that took part in the forward pass.
        gap: Why nothing was compared, None if it was.
    """

    structures: list[Structure]
    reached: frozenset[str]
    gap: str | None = None


class Run(NamedTuple):
    """What came out of a forward pass.

    Args:
        outputs: Every floating-point tensor among the model's outputs, by name.
        inner: What came out of the modules that own output weights, which tells more: later layers may hide a
            difference. The names are those of the modules with the numbers of their calls.
        called: The modules that took part.
    """

    outputs: dict[str, torch.Tensor]
    inner: dict[str, torch.Tensor]
    called: set[nn.Module]


class Unproven(RuntimeError):
    """The masked model gives nothing to compare with."""


def compact_proven(
    model: nn.Module, structures: Sequence[Structure], masks: Masks, optimizer: Any, calls: Sequence[Call]
) -> Proof:
    """Remove the units that masks drop, if the model computes the same without them as with zeros in their place.

    Both are run on the batch in evaluation mode, in float32 or, if the model or the comparison asks for it, in
    float64. Nothing but the removal is left of that.

    Args:
        model: The model; changed in place.
        structures: The structures that lose units.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.
        optimizer: The optimizer in the middle of the training; its state is sliced as well.
        calls: How the model was called on the batch.

    Returns:
        The structures as they are now. Where the masked model itself cannot run or gives NaN, nothing is compared.

    Raises:
        VerificationError: If the outputs differ, or the slim model cannot run; the message names the structures that
            are to blame. All is as it was then, bit for bit.
        RuntimeError: If the optimizer's state cannot be sliced; all is as it was then, too.
    """
    try:
        return _compact_same(model, structures, masks, optimizer, calls)
    except Unproven as error:
        return Proof(compact_model(model, structures, masks, optimizer), frozenset(), str(error))
    except VerificationError as error:
        blamed = list(find_blamed(structures, lambda some: _differs(model, some, masks, calls)))
        names = ", ".join(structure.name for structure in blamed or structures)
        reason = str(error).partition(" Nothing was saved")[0]
        raise VerificationError(
            f"Without the dropped units of {names} the model does not compute what it computes with zeros in their "
            f"place, on the batch of this step: {reason}"
        ) from error


def is_costly(model: nn.Module) -> bool:
    """Whether a proof may take longer than a training step.

    That computes with fewer bits where half precision is used; and on a GPU it may be over sooner than what a proof
    does beside its forward passes, module by module.

    Args:
        model: The model.

    Returns:
        True off the CPU, for weights in half precision, and for a forward pass that accelerate runs under autocast.
    """
    if find_device(model).type != "cpu":
        return True
    narrow = any(p.is_floating_point() and torch.finfo(p.dtype).bits < 32 for p in model.parameters())
    return narrow or any("_original_forward" in vars(module) for module in model.modules())


def run_calls(
    model: nn.Module, calls: Sequence[Call], dtype: torch.dtype, structures: Sequence[Structure] = ()
) -> Run:
    """Run a model once more as it was called, without dropout, gradients or autocast, and leave it as it was.

    Args:
        model: The model.
        calls: How it was called.
        dtype: The type in which it computes, at least.
        structures: The structures whose output weights are looked at.

    Returns:
        What came out, and what took part.
    """
    run = Run({}, {}, set())
    owners = {get_module(model, name): name for s in structures for name in _find_owners(s)}

    def widen(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            run.inner[f"{owners[module]}, call {len(run.inner)}"] = output

    with undisturbed(model), widened(model, dtype):
        handles = [m.register_forward_pre_hook(lambda module, _: run.called.add(module)) for m in model.modules()]
        handles += [owner.register_forward_hook(keep) for owner in owners]
        try:
            for path, args, kwargs in calls:
                module: Any = get_module(model, path)
                args, kwargs = tree_map(widen, (args, kwargs))
                run.outputs.update(find_tensors(getattr(module, "_orig_mod", module)(*args, **kwargs), path))
        finally:
            for handle in handles:
                handle.remove()
    return run


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode such that nothing of it is left.

    Attributes of modules, buffers and the state of all random generators are afterwards what they were; torch.compile
    and autocast, with which accelerate wraps the forward pass, do not take part.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    with evaluating(model), torch.autocast(find_device(model).type, enabled=False):
        for module in model.modules():
            if "_original_forward" in vars(module):
                module.forward = vars(module)["_original_forward"]
        yield


def _compact_same(
    model: nn.Module, structures: Sequence[Structure], masks: Masks, optimizer: Any, calls: Sequence[Call]
) -> Proof:
    """`compact_proven` without the names: float64 decides where float32 differs, if the model runs in it."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if all(p.dtype == torch.float64 for p in floating):
        return _compact_in(torch.float64, model, structures, masks, optimizer, calls)
    try:
        return _compact_in(torch.float32, model, structures, masks, optimizer, calls)
    except VerificationError as error:
        try:
            return _compact_in(torch.float64, model, structures, masks, optimizer, calls)
        except Unproven:
            raise error from None


def _compact_in(
    dtype: torch.dtype,
    model: nn.Module,
    structures: Sequence[Structure],
    masks: Masks,
    optimizer: Any,
    calls: Sequence[Call],
) -> Proof:
    """Zero, run, cut, run, compare, in one type; put back on any error."""
    undo = Undo(model, optimizer)
    undo.keep(structures, masks)
    try:
        zero_units(model, structures, masks)
        try:
            expected = run_calls(model, calls, dtype, structures)
            compare_outputs(expected.outputs, expected.outputs)
        except RUN_ERRORS as error:
            raise Unproven(str(error)) from error
        if not expected.outputs:
            raise Unproven("the model returns no floating-point tensors")
        compacted = compact_model(model, structures, masks, optimizer)
        try:
            actual = run_calls(model, calls, dtype, structures)
        except RUN_ERRORS as error:
            raise VerificationError(f"{type(error).__name__}: {error}") from error
        _compare_runs(expected, actual)
    except BaseException:
        undo.put_back()
        raise
    return Proof(compacted, frozenset(_find_reached(model, structures, expected.called)))


def _find_owners(structure: Structure) -> dict[str, str]:
    """For the modules that own output weights the names of those."""
    return {member.tensor.rpartition(".")[0]: member.tensor for member in structure.outputs}


def _find_reached(model: nn.Module, structures: Sequence[Structure], called: set[nn.Module]) -> Iterator[str]:
    """The output weights whose module took part, or the module around it, which may read the weight itself."""
    for structure in structures:
        for owner, weight in _find_owners(structure).items():
            if {get_module(model, owner), get_module(model, owner.rpartition(".")[0])} & called:
                yield weight


def _differs(model: nn.Module, structures: Sequence[Structure], masks: Masks, calls: Sequence[Call]) -> bool:
    undo = Undo(model)
    undo.keep(structures, masks)
    try:
        _compact_same(model, structures, masks, None, calls)
    except (VerificationError, Unproven) as error:
        return isinstance(error, VerificationError)
    undo.put_back()
    return False


def _compare_runs(expected: Run, actual: Run) -> None:
    """Compare what came out at the end, and inside where it has the same shape and can be compared."""
    compare_outputs(expected.outputs, actual.outputs)
    for name, wanted in expected.inner.items():
        got = actual.inner.get(name)
        if got is not None and got.shape == wanted.shape and wanted.isfinite().all():
            compare_outputs({name: wanted}, {name: got})
