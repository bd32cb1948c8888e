"""Whether removing units of a module changes what it computes: by numbers, on a small copy with random weights."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...modeling_hf_slim import infer_widths, set_sizes
from ..structure import Structure, get_module, get_tensor
from ..unit_counts import set_count
from .activation_functions import InconclusiveError, calm, is_plain_function

_LIMIT = 50_000_000
"""Elements of a copy; one of a larger module gets so many units only."""
_BATCH, _LENGTH, _LONG = 2, 5, 40
_DTYPE = torch.float64
_TOLERANCE = 1e-5
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATES = ("state", "residual", "input", "query", "key", "value", "context", "memory", "encod", "hidden")

_SIMPLE = (bool, int, float, str, torch.dtype)
_PLAIN = frozenset(nn.Module().__dict__)

_proven: dict[Hashable, str | None] = {}


def probe_module(module: nn.Module, structure: Structure) -> str | None:
    """Find out by numbers whether units can be removed from a module.

    What a copy with random weights, in double precision and without dropout, computes with some of its units zero is
    compared with what it computes without them. A module like another before, of the same sizes, is not run again.

    Args:
        module: The module; not changed, on any device, meta included.
        structure: A structure in it, its names relative to the module.

    Returns:
        None if both are the same, else what happens, as the reason to leave it alone.

    Raises:
        InconclusiveError: If the module cannot be run.
    """
    if structure.units < 2:
        return None
    key = _describe(module, structure)
    if key is not None and key in _proven:
        return _proven[key]
    found = _probe(module, structure)
    if key is not None:
        _proven[key] = found
    return found


def _probe(module: nn.Module, structure: Structure) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    total = sum(math.prod(parameter.shape) for parameter in module.parameters())
    own = sum(get_tensor(module, name).numel() for name in {m.tensor for m in structure.members})
    few = structure.units
    if total > _LIMIT:
        few = max(2, structure.multiple, structure.units * (_LIMIT - total + own) // own)
    if few > structure.units or total - own + own * few // structure.units > _LIMIT:
        raise InconclusiveError("it is too large to be tried")
    first = _choose(structure.units, few, generator)
    half, one = _choose(few, few // 2, generator), _choose(few, 1, generator)
    masks = (half, ~half, ~one) if few > 2 else (half, ~half)
    reason = next((reason for mask in masks if (reason := _compare(module, structure, first, mask, _LENGTH))), None)
    if reason is None:
        with contextlib.suppress(InconclusiveError):  # it may take short inputs only
            reason = _compare(module, structure, first, half, _LONG)
    return reason


Run = Callable[[nn.Module], torch.Tensor]


def _compare(
    module: nn.Module, structure: Structure, first: torch.Tensor, mask: torch.Tensor, length: int
) -> str | None:
    """Compare what a copy computes with some of its units zero and without them.

    Args:
        module: The module.
        structure: Its structure.
        first: The units that the copy has.
        mask: Of these the units that are kept.
        length: Of the hidden states.

    Returns:
        What the difference is, None if there is none.
    """
    try:
        copied = _copy(module)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError, AssertionError, ValueError) as error:
        raise InconclusiveError(f"a copy of it cannot be made ({_shorten(error)})") from error
    if not first.all():
        structure = _cut(copied, structure, first)
    generator = torch.Generator("cpu").manual_seed(1)
    _fill(copied, generator)
    run = _find_run(copied, structure, generator, length)
    whole = run(copied)
    for member in structure.deciders:
        get_tensor(copied, member.tensor).data.index_fill_(member.dim, member.index[~mask].flatten(), 0)
    expected = run(copied)
    if torch.equal(whole, expected):
        raise InconclusiveError("its output does not depend on the layers in it")
    _cut(copied, structure, mask)
    what = f"with {int(mask.sum())} of {len(mask)} units"
    try:
        actual = run(copied)
    except Exception as error:  # whatever code raises that counts on a number of units
        return f"its code fails {what} ({_shorten(error)})"
    if actual.shape != expected.shape:
        return f"its output is {tuple(actual.shape)} {what} instead of {tuple(expected.shape)}"
    if not expected.isfinite().all():
        raise InconclusiveError("its output is not finite")
    difference = (actual - expected).abs().max()
    if not difference <= _TOLERANCE * (1 + expected.abs().max()):
        return (
            f"what it computes {what} is not what it computes with the others zero (off by {float(difference):.2g}), "
            "so that units depend on one another or on their number"
        )
    return None


def _copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights have no values yet."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            raise InconclusiveError("its weights are not stored as plain numbers")
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
    for part in module.modules():
        if "config" in part.__dict__:
            memo[id(part.__dict__["config"])] = part.__dict__["config"]
    found = copy.deepcopy(module, memo).eval()
    for part in found.modules():
        for hooks in _HOOKS:
            part.__dict__[hooks] = type(part.__dict__[hooks])()
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta and not buffer.is_floating_point():
                raise InconclusiveError(f"its buffer {name} has no values")
    return found


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Give all weights random values on the CPU, such that no part is dead."""
    made: dict[int, nn.Parameter] = {}
    block = torch.randn(999_983, generator=generator, dtype=_DTYPE, device="cpu")
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                size = parameter.numel()
                values = block.repeat(-(-size // len(block)))[:size].view(parameter.shape)
                scale = math.sqrt(math.prod(parameter.shape[1:])) if parameter.dim() > 1 else 1.0
                made[id(parameter)] = nn.Parameter(values / scale + 0.3 * (parameter.dim() < 2), requires_grad=False)
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                buffer = torch.randn(buffer.shape, generator=generator, device="cpu")
            part._buffers[name] = buffer.to("cpu", _DTYPE if buffer.is_floating_point() else None)


def _cut(module: nn.Module, structure: Structure, mask: torch.Tensor) -> Structure:
    """Remove the units that a mask drops from a copy, and say what the structure is then."""
    kept = int(mask.sum())
    numbers = {}
    for (name, dim), where in structure.positions(~mask).items():
        tensor = get_tensor(module, name)
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool, device="cpu")
        keep[where] = False
        numbers[name, dim] = keep.cumsum(0) - 1
        tensor.data = tensor.data.index_select(dim, keep.nonzero().flatten().to(tensor.device))
        set_sizes(get_module(module, name.rpartition(".")[0]))
    for count in structure.counts:
        set_count(module, count, kept)
    for name in structure.reshaping:
        infer_widths(get_module(module, name))
    for member in structure.members:
        if member.role == "norm":
            tensor = get_tensor(module, member.tensor)
            tensor.data = tensor.data * math.sqrt(structure.units / kept)
    return structure.keep(mask, numbers)


def _choose(units: int, kept: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(units, generator=generator, device="cpu") < kept


def _find_run(module: nn.Module, structure: Structure, generator: torch.Generator, length: int) -> Run:
    """The first way of calling a module that works."""
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in (0, 1, 3)]
    if not parameters or parameters[0].kind == 3:
        raise InconclusiveError("its forward takes no hidden states")
    needed = [p for p in parameters[1:] if p.default is p.empty]
    shapes = list(dict.fromkeys(_shapes(module, structure, length)))
    for shape, alike in product(shapes, (False, True) if needed else (False,)):
        first = torch.randn(shape, generator=generator, dtype=_DTYPE, device="cpu")
        others = {p.name: _make(p.name, first, length, structure, module, generator, alike=alike) for p in needed}
        positional = [others.pop(p.name) for p in needed if p.kind == 0]
        run = partial(_run, [first, *positional], others)
        try:
            run(module)
        except Exception:  # another shape may work; if none does, the module cannot be run
            continue
        return run
    raise InconclusiveError("it cannot be run on hidden states alone")


@torch.no_grad()
def _run(positional: list[Any], named: dict[str, Any], module: nn.Module) -> torch.Tensor:
    """The first tensor of what a module gives for inputs, that of the first input's shape before others."""
    with calm():
        output = module(*copy.deepcopy(positional), **copy.deepcopy(named))
    tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
    alike = [tensor for tensor in tensors if tensor.shape == positional[0].shape]
    return (alike or tensors)[0]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def _shapes(module: nn.Module, structure: Structure, length: int) -> Iterator[tuple[int, ...]]:
    """The shapes that hidden states may have."""
    output = structure.outputs[0]
    for member in (output, *(m for m in structure.members if m.role == "input")):
        tensor = get_tensor(module, member.tensor)
        owner = get_module(module, member.tensor.rpartition(".")[0])
        if isinstance(owner, _ConvNd):
            width = owner.in_channels if member is not output else owner.out_channels
            yield (_BATCH, width, *[8] * (tensor.dim() - 2))
            yield (_BATCH, length, width)
        elif tensor.dim() == 2:
            width = tensor.shape[1 - member.dim]
            yield (_BATCH, length, width)
            yield (_BATCH, width)
            yield (_BATCH, 4, 4, width)
            yield (_BATCH, width, length)


def _make(
    name: str,
    first: torch.Tensor,
    length: int,
    structure: Structure,
    module: nn.Module,
    generator: torch.Generator,
    *,
    alike: bool,
) -> Any:
    """A value for an argument that a module asks for beside the hidden states."""
    if "position" in name and "embed" in name or "rotary" in name or "freqs" in name:
        sizes = [m.__dict__["head_dim"] for m in module.modules() if type(m.__dict__.get("head_dim")) is int]
        size = sizes[0] if sizes else structure.outputs[0].index.shape[1]
        angles = torch.randn(1, length, size // 2, generator=generator, dtype=first.dtype, device="cpu")
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos(), angles.sin())
    if "position" in name:
        return torch.arange(length, device="cpu")[None]
    if alike or any(part in name for part in _STATES):
        return torch.randn(first.shape, generator=generator, dtype=first.dtype, device="cpu")
    return None


def _describe(module: nn.Module, structure: Structure) -> Hashable | None:
    """What the verdict depends on; None if that cannot be told, so that it is not kept."""
    parts: list[Hashable] = [structure.name, structure.units]
    for path, part in module.named_modules():
        shapes = tuple(
            (name, tuple(t.shape)) for name, t in (*part._parameters.items(), *part._buffers.items()) if t is not None
        )
        parts += (path, type(part), shapes)  # type: ignore[arg-type]
        for name, value in part.__dict__.items():
            if name == "config":
                parts.append(str(sorted(getattr(value, "__dict__", {}).items(), key=str)))
            elif value is None or isinstance(value, _SIMPLE) or is_plain_function(value):
                parts.append((name, value))
            elif name not in _PLAIN:
                return None
    return tuple(parts)


def _shorten(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def relative(structure: Structure, path: str) -> Structure:
    """A structure of a model as one of a module in it.

    Args:
        structure: The structure.
        path: Dotted name of the module.

    Returns:
        The structure with names below the module.
    """
    return structure.rename(lambda name: name[len(path) + 1 :]) if path else structure
