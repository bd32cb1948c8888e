"""A dense model without its weights, of which models of any sizes are built, to be counted or timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..compaction import compact_model, copy_modules, find_pretrained, grow_tensors
from ..parallel import find_device, whole_shape
from ..structures import Structure

Kept = Mapping[str, int]
"""For each structure's name how many units it has; all of them where it is not named."""

_DEVIATION = 0.02


class Skeleton:
    """The modules of a dense model, its parameters without values.

    Args:
        model: The model; units may have left it while it trained.
        structures: The structures of the dense model.
        sizes: For tensors from which units have left the sizes that they had.

    Attributes:
        model: The modules.
        structures: The structures.
        device: Where the model computes.
    """

    def __init__(self, model: nn.Module, structures: Iterable[Structure], sizes: Mapping[str, torch.Size]) -> None:
        """See the class."""
        self.structures = tuple(structures)
        self.device = find_device(model)
        self.model = extract_model_from_parallel(
            copy_modules(model, {id(p): _without_values(p) for p in model.parameters()}), keep_fp32_wrapper=False
        )
        grow_tensors(self.model, sizes, self.structures if sizes else ())

    def build(self, kept: Kept) -> nn.Module:
        """Build a model of other sizes, with random weights, where the dense one computes.

        Args:
            kept: How many units the structures have.

        Returns:
            The model.
        """
        return _fill(self._cut(kept), self.device)

    def build_countable(self, kept: Kept, *, has_values: bool) -> nn.Module:
        """Build a model of other sizes, whose matrix products are all written out.

        Kernels that fuse attention are not all counted, and to run over experts one by one takes values.

        Args:
            kept: How many units the structures have.
            has_values: Whether it has random weights, for code that asks for values; else it is on the meta device.

        Returns:
            The model.
        """
        model = self._cut(kept)
        write_out(model)
        return _fill(model, self.device) if has_values else model.to("meta")

    def _cut(self, kept: Kept) -> nn.Module:
        model = copy_modules(self.model, {})
        smaller = [s for s in self.structures if kept.get(s.name, s.units) < s.units]
        compact_model(model, smaller, {s.name: torch.arange(s.units) < kept[s.name] for s in smaller})
        return model


def write_out(model: nn.Module) -> None:
    """Have the models in a module compute attention and experts as separate matrix products, which ask for no values.

    Args:
        model: The module; changed in place.
    """
    for part in find_pretrained(model):
        part.set_attn_implementation("eager")
        with suppress(ValueError):  # it has no experts
            part.set_experts_implementation("batched_mm")


def _fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Give a model random weights; those that were tied still are."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = _with_values(parameter, device)
                module._parameters[name] = made[id(parameter)]
    return model


def _without_values(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False)


def _with_values(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    values = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
    if values.is_floating_point():
        values.normal_(0, _DEVIATION, generator=torch.Generator(device).manual_seed(0))
    return nn.Parameter(values, requires_grad=False)
