"""A row of the table of layouts: which children a module has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class FfnLayout:
    """A feed-forward network: first layers, an elementwise activation (and a gate's product), the second layer.

    Args:
        first: Paths of the layers that make the intermediate channels; two where the network is gated. A single layer
            that makes twice the channels holds gate and up, the one after the other.
        second: Path of FFN2, which reads them.
        between: Paths of layers between the two, where they are there: depthwise convolutions and RMS norms.
        alone: Whether the module has no other tensors.
    """

    first: tuple[str, ...]
    second: str
    between: tuple[str, ...] = ()
    alone: bool = False

    @cached_property
    def roots(self) -> frozenset[str]:
        """The children of which a module has one if it matches."""
        return frozenset((self.second.partition(".")[0],))

    @property
    def size(self) -> int:
        """How much a module has to have to match."""
        return len(self.first) + 1


@dataclass(frozen=True)
class Fused:
    """One layer that makes query, key and value, or two of them.

    Args:
        layer: Its path.
        parts: What its output holds, in this order.
        by_unit: Whether it holds that for one unit after the other, instead of each part for all units.
        copies: How often that order repeats, each time for an equal share of the heads.
    """

    layer: str
    parts: str = "qkv"
    by_unit: bool = False
    copies: int = 1


@dataclass(frozen=True)
class MhaLayout:
    """Multi-head attention: what makes query, key and value, and the output projection.

    A layer that is not fused gives each unit, in turn, an equal range of its output.

    Args:
        inputs: Paths of the layers for query, key and value, or fused ones.
        outputs: Paths of the output projection; the first that is there is taken.
        having: Name of an attribute or child that the module must have for the row to match.
        joint: Name of an attribute. Modules that have it share one attention bias with the same module in the other
            blocks of their stack, so that they lose the same heads.
        widths: Names of attributes that hold the width of all query heads, where elsewhere they hold another size.
    """

    inputs: tuple[str | Fused, ...]
    outputs: tuple[str, ...]
    having: str | None = None
    joint: str | None = None
    widths: tuple[str, ...] = ()

    @cached_property
    def roots(self) -> frozenset[str]:
        """The children of which a module has one if it matches."""
        return frozenset(name.partition(".")[0] for name in self.outputs)

    @property
    def size(self) -> int:
        """How much a module has to have to match."""
        return len(self.inputs) + 1 + (self.having is not None)
