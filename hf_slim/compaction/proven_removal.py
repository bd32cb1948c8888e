"""The proof, by numbers, that a model computes without its zero units what it computed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..parallel import check_values
from ..proof import (
    HALF,
    Outputs,
    VerificationError,
    compare_outputs,
    compare_runs,
    compute_outputs,
    is_comparable,
    make_inputs,
)
from ..structures import (
    REMEDY,
    Masks,
    Structure,
    find_structures,
    get_module,
    has_adapters,
    merge_adapters,
    require_structures,
)
from .compact import round_masks
from .config_fields import record_shapes
from .shape_record import find_pretrained
from .undo import Undo
from .zeros import find_zero_units

logger = logging.get_logger(__name__)

_BLAMED = 5
"""So many structures are looked for that make a difference; one is enough to refuse."""


class Proof:
    """What a masked model computes on some inputs, to be compared with what it computes without its zero units.

    Args:
        model: The masked model; it is run.
        batches: Inputs for the models in it, or for itself.

    Attributes:
        batches: The same.
        outputs: What was computed in float32.

    Raises:
        ValueError: If it cannot run on them.
    """

    def __init__(self, model: nn.Module, batches: Mapping[nn.Module, Mapping[str, Any]]) -> None:
        """See the class."""
        self.batches = batches
        self._model = model
        self._reached: set[nn.Module] = set()
        self._readers: dict[nn.Module, str] = {}  # with the names of their weights
        with _watching(model, self._reached):
            self.outputs = self._run(torch.float32)

    def remove(
        self,
        structures: Sequence[Structure],
        masks: Masks,
        record: Callable[[Sequence[Structure]], None],
        *,
        shared: bool = False,
    ) -> None:
        """Remove the units that masks drop, and compare.

        Args:
            structures: The structures of the model.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; what they drop is zero.
            record: Writes down the new shape, by the structures as they are then.
            shared: Whether another model holds the same tensors.

        Raises:
            VerificationError: If the outputs differ, or the model does not run any more.
            BaseException: What is raised meanwhile; the model is then as before.
        """
        undo = Undo(self._model, shared=shared)
        computed: dict[torch.dtype, Outputs] = {}
        self._readers = {
            get_module(self._model, _owners(m.tensor)[0]): m.tensor for s in structures for m in s.outputs
        }

        def run_masked(dtype: torch.dtype) -> Outputs:
            if dtype not in computed:
                undo.put_back()
                computed[dtype] = self._run(dtype)
            return computed[dtype]

        def run_slim(dtype: torch.dtype) -> Outputs:
            record(undo.cut(structures, masks))
            return self._run_slim(dtype)

        try:
            compare_runs(run_masked, run_slim)
        except VerificationError as error:
            undo.put_back()
            dtype = torch.float64 if torch.float64 in computed else torch.float32
            message = str(error)
            if all(is_comparable(output) for output in computed[dtype].values()):
                dropped = [s for s in structures if not masks[s.name].all()]
                try:
                    names = list(self._find_blamed(dropped, masks, undo, computed[dtype], dtype))
                finally:
                    undo.put_back()
                message += f" {_name_blamed(names or [s.name for s in dropped])}"
            consequence = "Nothing was saved." if shared else "The model is as it was."
            raise VerificationError(f"{message} {consequence}") from error.__cause__ or error
        except BaseException:
            undo.put_back()
            raise

    def find_unproven(self, structures: Iterable[Structure], masks: Masks) -> tuple[str, ...]:
        """Find the structures that lose units and that no input reached.

        A structure is reached where the layers that read its units, or the modules around them, were called.

        Args:
            structures: The structures of the model.
            masks: For each structure's name a boolean tensor of shape `[units]`, True = keep.

        Returns:
            Their names.
        """
        return tuple(
            s.name
            for s in structures
            if not masks[s.name].all()
            and not all(
                any(get_module(self._model, path) in self._reached for path in _owners(member.tensor))
                for member in s.outputs
            )
        )

    def _run(self, dtype: torch.dtype) -> Outputs:
        """What the model gives, and what the layers that read the units do: later ones may hide a difference."""
        found: Outputs = {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and is_comparable(output):
                inner[f"what {self._readers[module]} makes, call {len(inner)}"] = output.clone()

        for number, (module, batch) in enumerate(self.batches.items()):
            inner: Outputs = {}
            prefix = f"{type(module).__name__} {number}: " if len(self.batches) > 1 else ""
            handles = [reader.register_forward_hook(keep) for reader in self._readers]
            try:
                outputs = {**compute_outputs(module, batch, dtype), **inner}
            finally:
                for handle in handles:
                    handle.remove()
            found |= {f"{prefix}{name}": value for name, value in outputs.items()}
        return found

    def _run_slim(self, dtype: torch.dtype) -> Outputs:
        try:
            return self._run(dtype)
        except ValueError as error:
            raise VerificationError(
                f"The masked model runs, but the slimmed one does not: {error.__cause__}."
            ) from error

    def _find_blamed(
        self, structures: Sequence[Structure], masks: Masks, undo: Undo, expected: Outputs, dtype: torch.dtype
    ) -> Iterator[str]:
        """Halve the structures until those are left that make a difference by themselves; not many of them."""
        found = 0
        waiting = [list(structures)]
        while waiting and found < _BLAMED:
            some = waiting.pop()
            try:
                undo.cut(some, masks)
                compare_outputs(expected, self._run_slim(dtype))
            except VerificationError:
                half = len(some) // 2
                if half:
                    waiting += [some[half:], some[:half]]
                else:
                    found += 1
                    yield some[0].name
            undo.put_back()


def find_proof(
    model: nn.Module, verify: bool | Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> Proof | None:
    """Run a masked model on a batch, or on inputs that are made for it.

    Args:
        model: The masked model.
        verify: A batch for the transformers model in it, or for itself where it holds none; True if a batch is to be
            found; False if nothing is to be proven.
        own: A batch of the training of the model, which is used if the model runs on it.

    Returns:
        The proof; None if nothing is to be proven.

    Raises:
        ValueError: If the model cannot run on the batch, or no input can be made for it.
    """
    if verify is False:
        return None
    parts = find_pretrained(model)
    if isinstance(verify, Mapping):
        if len(parts) > 1:
            names = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(f"verify: one batch cannot be for {len(parts)} models ({names}); pass True or False.")
        return Proof(model, {parts[0] if parts else model: dict(verify)})
    if not parts:
        raise ValueError(
            f"{type(model).__name__} is no transformers model, so that no inputs can be made for it: pass a batch of "
            "yours, verify={...}, or verify=False."
        )
    if own is not None and len(parts) == 1:
        try:
            proof = Proof(model, {parts[0]: own})
        except ValueError as error:
            logger.info(f"Compared on made inputs, not on a batch of the trainer's data: {error}")
        else:
            if all(is_comparable(output) for output in proof.outputs.values()):
                return proof
            logger.info("Compared on made inputs: on a batch of the trainer's data the outputs are not all finite.")
    return Proof(model, {part: make_inputs(part) for part in parts})


def merge_proven(model: nn.Module, proof: Proof | None) -> tuple[nn.Module, Proof | None]:
    """Merge the adapters of a model, and see that it computes the same afterwards.

    In half precision merging rounds the weights, so that there is nothing to compare with.

    Args:
        model: A model with adapters or without.
        proof: What it computes; None if nothing is to be proven.

    Returns:
        The model without adapters, and what that computes.

    Raises:
        VerificationError: If it computes something else.
    """
    if not has_adapters(model):
        return model, proof
    merged = merge_adapters(model)
    if proof is None:
        return merged, None
    before, proof = proof, Proof(merged, proof.batches)
    if not any(parameter.dtype in HALF for parameter in merged.parameters()):
        try:
            compare_outputs(before.outputs, proof.outputs)
        except VerificationError as error:
            raise VerificationError(f"With the adapters merged: {error} Nothing was saved.") from error
    return merged, proof


def find_removable(model: nn.Module, multiple: int, known: Masks | None = None) -> tuple[tuple[Structure, ...], Masks]:
    """Find the zero units of a model that can be removed.

    Args:
        model: The masked model.
        multiple: Multiple for the number of intermediate channels.
        known: For the names of structures whose zero units are known a boolean tensor of shape `[units]`, True = keep;
            those of the others are looked for.

    Returns:
        Its structures; and for the name of each a boolean tensor of shape `[units]`, True = keep.

    Raises:
        ValueError: If the model has adapters, no weights, or nothing to slim.
    """
    found = find_structures(model)
    if has_adapters(model):
        raise ValueError(f"{type(model).__name__} has adapters, so it cannot be made smaller. {REMEDY}")
    structures = require_structures(model, found)
    check_values(model, (member.tensor for s in structures for member in s.members))
    known = {} if known is None else known
    masks = {s.name: known[s.name] for s in structures if len(known.get(s.name, ())) == s.units}
    masks |= find_zero_units(model, [s for s in structures if s.name not in masks])
    return structures, round_masks(structures, masks, multiple)


def remove_units(
    model: nn.Module, structures: Sequence[Structure], masks: Masks, proof: Proof | None, *, is_copy: bool = False
) -> tuple[str, ...]:
    """Remove zero units from a model and prove that it computes the same; or leave it as it was.

    Args:
        model: The masked model; changed in place.
        structures: Its structures.
        masks: For each structure's name a boolean tensor of shape `[units]`, True = keep; what they drop is zero.
        proof: What it computes; None if nothing is to be proven.
        is_copy: Whether another model holds the same tensors, and this one is to be saved.

    Returns:
        The names of the structures that have lost units without proof, since no input reached them, or there was none.

    Raises:
        VerificationError: If the model computes something else.
        BaseException: What is raised meanwhile; the model is then as before.
    """

    def record(left: Sequence[Structure]) -> None:
        record_shapes(model, left)

    dropped = [s for s in structures if not masks[s.name].all()]
    if proof is not None and dropped:
        proof.remove(structures, masks, record, shared=is_copy)
        return proof.find_unproven(structures, masks)
    undo = Undo(model, shared=is_copy)
    try:
        record(undo.cut(structures, masks))
    except BaseException:
        undo.put_back()
        raise
    return tuple(s.name for s in dropped)


def name_unproven(names: Sequence[str]) -> str:
    """What is said of structures that no input reached."""
    return (
        f"No input reached {', '.join(names)}, so it is not proven that the slimmed model computes the same there. "
        "Pass a batch that does, verify={...}."
    )


def _name_blamed(names: Sequence[str]) -> str:
    return (
        f"The difference comes from {', '.join(names)}, which is not computed unit by unit as it looked: leave it out "
        "with slim_exclude when you train, and please report the class of the model."
    )


def _owners(tensor: str) -> tuple[str, str]:
    """The dotted names of the module that holds a tensor, and of the one around it."""
    owner = tensor.rpartition(".")[0]
    return owner, owner.rpartition(".")[0]


@contextmanager
def _watching(model: nn.Module, called: set[nn.Module]) -> Iterator[None]:
    """See which modules are called."""
    handles = [
        module.register_forward_pre_hook(lambda module, *_: called.add(module))
        for module in dict.fromkeys(model.modules())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
