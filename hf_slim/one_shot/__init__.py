"""Slimming without training: what layers read of a few samples says which units go and what the others take over."""

from .methods import MethodName
from .slimming import slim
