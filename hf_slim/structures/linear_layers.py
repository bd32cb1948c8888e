"""What counts as a linear layer, and where its outputs and inputs lie in its weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .structure import Member, Role

BASE = "base_layer"
"""The child in which a module that adds adapters to a layer holds the layer."""


@dataclass(frozen=True)
class Layer:
    """A layer that is linear in its inputs, or a stack of such layers, one for each expert.

    Args:
        weight: Dotted name of the weight below the module that was asked.
        bias: Dotted name of the bias, if there is one.
        inputs: How many inputs it has.
        outputs: How many outputs it has.
        input_dim: Dimension of the weight along which the inputs lie.
        output_dim: Dimension of the weight along which the outputs lie.
        bias_dim: Dimension of the bias along which the outputs lie.
        groups: How many equal groups its outputs and inputs form, each output reading the inputs of its group only.
        adapters: The weights of the low-rank adapters that add to it, `[rank, inputs]` and `[outputs, rank]` of each.
    """

    weight: str
    bias: str | None
    inputs: int
    outputs: int
    input_dim: int
    output_dim: int
    bias_dim: int = 0
    groups: int = 1
    adapters: tuple[tuple[str, str], ...] = ()

    def members(self, index: torch.LongTensor, role: Role) -> list[Member]:
        """The members of a structure in this layer, their names relative to the module that was asked for it.

        Args:
            index: Positions of each unit among the outputs, or among the inputs for the role `output`.
            role: `input` if units own outputs of the layer, `output` if they own inputs.

        Returns:
            The weight, and the bias where units own outputs; the side of the adapters on which the units lie.
        """
        if role == "output":
            found = [Member(self.weight, self.input_dim, index, role)]
            return found + [Member(down, 1, index, "adapter") for down, _ in self.adapters]
        found = [Member(self.weight, self.output_dim, index, role)]
        if self.bias is not None:
            found.append(Member(self.bias, self.bias_dim, index, "extra"))
        return found + [Member(up, 0, index, "extra") for _, up in self.adapters]


def find_layer(module: nn.Module, path: str, *, swapped: bool = False) -> Layer | None:
    """Find the layer at a path below a module.

    `nn.Linear`, transformers' `Conv1D` and convolutions are layers; so are a module that only wraps one as
    its child `linear`, one with low-rank adapters beside its child `base_layer`, and parameters with an expert
    dimension in front, stored by themselves or as the weight of a module.

    Args:
        module: Any module.
        path: Names of children, and of a parameter at the end, joined by dots.
        swapped: Whether parameters with an expert dimension have their inputs before their outputs.

    Returns:
        The layer, or None if there is none.
    """
    owner, _, leaf = path.rpartition(".")
    parent = find_child(module, owner)
    if parent is None:
        return None
    weight = parent._parameters.get(leaf)
    if weight is not None:
        bias = f"{path}_bias" if parent._parameters.get(f"{leaf}_bias") is not None else None
        return _stacked(path, bias, weight, swapped=swapped) if weight.dim() == 3 else None
    child = parent._modules.get(leaf)
    if child is None:
        return None
    if "linear" in child._modules and len(child._modules) == 1 and not child._parameters:
        path, child = f"{path}.linear", child._modules["linear"]
    if child is not None and BASE in child._modules:
        return _find_adapted(path, child)
    weight = None if child is None else child._parameters.get("weight")
    if child is None or weight is None:
        return None
    bias = f"{path}.bias" if child._parameters.get("bias") is not None else None
    if isinstance(child, Conv1D):
        return Layer(f"{path}.weight", bias, weight.shape[0], weight.shape[1], 0, 1)
    if isinstance(child, nn.Linear):
        if child._buffers:
            return None
        return Layer(f"{path}.weight", bias, child.in_features, child.out_features, 1, 0)
    if isinstance(child, _ConvNd):
        return Layer(f"{path}.weight", bias, child.in_channels, weight.shape[0], 1, 0, groups=child.groups)
    if weight.dim() == 3 and len(child._parameters) == 1 and not child._modules:
        return _stacked(f"{path}.weight", None, weight, swapped=False)
    return None


def find_child(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path below another, which may be empty; None if there is none."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found


def find_tensor(module: nn.Module, path: str) -> torch.Tensor | None:
    """The parameter or buffer at a path below a module; None if there is none."""
    owner, _, leaf = path.rpartition(".")
    parent = find_child(module, owner)
    if parent is None:
        return None
    tensor = parent._parameters.get(leaf)
    return parent._buffers.get(leaf) if tensor is None else tensor


def tensors_outside(module: nn.Module, explained: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Find the tensors of a module that nothing explains.

    Args:
        module: Any module.
        explained: Paths of children, and of parameters; the bias of a stacked parameter goes with it.

    Yields:
        Names and tensors of the parameters and buffers that belong to none of the paths.
    """
    inside = tuple(text for name in explained for text in (f"{name}.", f"{name}_bias"))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in explained and not name.startswith(inside):
            yield name, tensor


def join(*parts: str) -> str:
    """Names joined by dots, without the empty ones."""
    return ".".join(part for part in parts if part)


def layer_of(tensor: str) -> str:
    """The dotted name of the layer that holds a weight, without what it is wrapped in."""
    name = tensor.rpartition(".")[0]
    for wrapped in (f".{BASE}", ".linear"):
        name = name.removesuffix(wrapped)
    return name


def _find_adapted(path: str, child: nn.Module) -> Layer | None:
    """A layer and its low-rank adapters; what else changes it is for `find_obstacle` to see."""
    base = find_layer(child, BASE)
    if base is None:
        return None
    pairs = []
    for name in dict((child._modules.get("lora_A") or nn.Module()).named_children()):
        names = (f"lora_A.{name}.weight", f"lora_B.{name}.weight")
        down, up = (find_tensor(child, adapter) for adapter in names)
        if down is None or up is None or down.dim() != 2 or base.groups > 1:
            continue
        if down.shape[1] == base.inputs and up.shape == (base.outputs, down.shape[0]):
            pairs.append((f"{path}.{names[0]}", f"{path}.{names[1]}"))
    bias = None if base.bias is None else f"{path}.{base.bias}"
    return replace(base, weight=f"{path}.{base.weight}", bias=bias, adapters=tuple(pairs))


def _stacked(path: str, bias: str | None, weight: torch.Tensor, *, swapped: bool) -> Layer:
    input_dim, output_dim = (1, 2) if swapped else (2, 1)
    return Layer(path, bias, weight.shape[input_dim], weight.shape[output_dim], input_dim, output_dim, bias_dim=1)
