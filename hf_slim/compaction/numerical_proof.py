"""What a masked model computes on some inputs, compared with what it computes without its zero units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..proof import (
    Outputs,
    VerificationError,
    compare_outputs,
    compare_runs,
    compute_outputs,
    is_comparable,
)
from ..structures import (
    Masks,
    Structure,
    get_module,
)
from .undo import Undo

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
                expected = computed[dtype]
                blamed = list(find_blamed(dropped, lambda some: self._differs(some, masks, undo, expected, dtype)))
                message += f" {_name_blamed([s.name for s in blamed or dropped])}"
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

    def _differs(
        self, structures: Sequence[Structure], masks: Masks, undo: Undo, expected: Outputs, dtype: torch.dtype
    ) -> bool:
        try:
            undo.cut(structures, masks)
            compare_outputs(expected, self._run_slim(dtype))
        except VerificationError:
            return True
        finally:
            undo.put_back()
        return False


def find_blamed(
    structures: Sequence[Structure], differs: Callable[[Sequence[Structure]], bool]
) -> Iterator[Structure]:
    """Halve structures until those are left that make a difference by themselves; not many of them.

    Args:
        structures: The structures that make a difference together.
        differs: Whether some of them do.

    Yields:
        Structures; none where only several together make a difference.
    """
    found = 0
    waiting = [structures]
    while waiting and found < _BLAMED:
        some = waiting.pop()
        if not differs(some):
            continue
        half = len(some) // 2
        if half:
            waiting += [some[half:], some[:half]]
        else:
            found += 1
            yield some[0]


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
