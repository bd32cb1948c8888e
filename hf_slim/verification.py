"""Inputs for a model from its config, and the comparison of what two models make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference allowed, relative to the largest output; other types are allowed `LOW_PRECISION`."""
LOW_PRECISION = 0.05
ABSOLUTE = 0.1
"""Outputs smaller than this are compared as if they were so large: they may be differences of larger numbers."""
LENGTH = 16
SEED = 0


class VerificationError(RuntimeError):
    """The slimmed model does not compute what the masked model computed."""


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Make a random example that a model can take, the same every time.

    Args:
        model: A text, vision or encoder-decoder model.

    Returns:
        Keyword arguments for its forward pass: `input_ids` of shape `[1, 16]` (and `decoder_input_ids`), or
        `pixel_values` of shape `[1, channels, height, width]`.

    Raises:
        ValueError: If the model takes something else; the message says how to pass a batch.
    """
    generator = torch.Generator().manual_seed(SEED)
    name = model.main_input_name
    config = model.config.get_text_config() if name == "input_ids" else model.config
    if name == "input_ids":
        low = 1 + max((i for i in _special_ids(config) if i + 1 < config.vocab_size), default=0)
        low = low if low < config.vocab_size // 2 else 0
        length = min(LENGTH, getattr(config, "max_position_embeddings", 2 * LENGTH) // 2)
        inputs = {name: torch.randint(low, config.vocab_size, (1, length), generator=generator)}
        if isinstance(config.eos_token_id, int) and config.eos_token_id < config.vocab_size:
            inputs[name][:, -1] = config.eos_token_id
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs[name].flip(1)
    elif name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {name: torch.randn(1, config.num_channels, height, width, generator=generator).to(model.dtype)}
    else:
        raise ValueError(
            f"{type(model).__name__} takes {name}, for which no input can be made: pass a batch of yours, "
            "verify={'" + name + "': ...}, or verify=False."
        )
    return {key: value.to(model.device) for key, value in inputs.items()}


@torch.no_grad()
def compute_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Run a model in evaluation mode, with the same random numbers every time.

    Args:
        model: The model; its training mode is restored afterwards.
        inputs: Keyword arguments for its forward pass.

    Returns:
        Every floating-point tensor among its outputs, by name; without caches.

    Raises:
        ValueError: If the model cannot run on these inputs; the message says how to pass a batch.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(SEED)
            outputs = model(**inputs)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot run on {', '.join(inputs)} of shapes "
            f"{[tuple(value.shape) for value in inputs.values() if isinstance(value, torch.Tensor)]}: {error}. Pass a "
            "batch of yours, verify={...}, or verify=False."
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return dict(_tensors(outputs, ""))


def compare_outputs(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]) -> None:
    """Refuse two models that differ.

    Args:
        expected: Outputs of the masked model.
        actual: Outputs of the slimmed model.

    Raises:
        VerificationError: If they differ by more than rounding, or are not finite; the message says where and by how
            much.
    """
    if expected.keys() != actual.keys():
        raise VerificationError(f"The outputs are {sorted(actual)} instead of {sorted(expected)}. Nothing was saved.")
    for name, wanted in expected.items():
        got = actual[name]
        if not torch.isfinite(wanted).all():
            raise VerificationError(
                f"The masked model's {name} holds NaN or infinity, so it cannot be compared: the training has "
                "diverged, or the batch is unfit. Nothing was saved."
            )
        if wanted.shape != got.shape:
            raise VerificationError(
                f"The slimmed model's {name} has shape {tuple(got.shape)} instead of {tuple(wanted.shape)}. Nothing "
                "was saved."
            )
        tolerance = TOLERANCES.get(wanted.dtype, LOW_PRECISION)
        limit = tolerance * (float(wanted.abs().max()) + ABSOLUTE) if wanted.numel() else 0.0
        difference = float((wanted.double() - got.double()).abs().max()) if wanted.numel() else 0.0
        if not difference <= limit:
            raise VerificationError(
                f"The slimmed model's {name} differs from the masked model's by {difference:.3g} (allowed: "
                f"{limit:.3g}). Nothing was saved. A structure was taken for something that it is not: please report "
                "the model class, and leave it out with slim_exclude."
            )


def _special_ids(config: Any) -> Iterator[int]:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, int) and number >= 0:
                yield number


def _tensors(outputs: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield prefix or "output", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(outputs, (list, tuple)):
        for number, value in enumerate(outputs):
            yield from _tensors(value, f"{prefix}[{number}]")
