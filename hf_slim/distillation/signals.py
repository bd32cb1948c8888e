"""What of a call is compared with the teacher's: logits or embeddings, and hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .watched_calls import Call, is_transformer, replacing_forward

LAST_HIDDEN = "last_hidden"
POSITION_LOGITS = ("start_logits", "end_logits")
EMBEDDINGS = ("sentence_embedding", "token_embeddings")
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
_EVERY = 2  # GRAIN, arXiv 2212.07634, compares every layer; every second one says nearly the same at half the cost
Signals = dict[str, torch.Tensor]


def find_signals(call: Call, *, hidden: bool, last: bool) -> Signals:
    """Find what of a call is compared.

    Args:
        call: A call, with its outputs.
        hidden: Whether hidden states are wanted beside logits or embeddings.
        last: Whether the last hidden state alone is wanted.

    Returns:
        Tensors by name: everything that is called logits; where there is none, embeddings of sentences or of tokens;
        every second hidden state, counted from the last.

    Raises:
        ValueError: If nothing of it is there.
    """
    outputs = [c.output for c in call.walk() if isinstance(c.output, Mapping)]
    states = _find_states(outputs) if hidden or last else {}
    if (hidden or last) and not states:
        raise ValueError(
            f"{type(call.module).__name__} gives no hidden states, so that they cannot be compared with a teacher's: "
            "leave slim_hidden_weight at 0 and slim_distill_from at 'outputs'."
        )
    if last:
        return {LAST_HIDDEN: next(reversed(states.values()))[-1]}
    outer = next((c for c in call.walk() if is_transformer(c.module)), call)
    if isinstance(outer.output, tuple):  # the models in it have names, but what they give is not what this one says
        outputs = []
    signals = (
        {} if not outputs else _find_logits(outputs) or _find_logits(_complete(call)) or _find_embeddings(outputs)
    )
    if not signals:
        names = sorted({name for output in outputs for name in output}) or "no named outputs"
        raise ValueError(
            f"{type(call.module).__name__} gives neither logits nor embeddings to compare with a teacher's, but "
            f"{names}. Train with return_dict=True, or with slim_distill_from='last_hidden'."
        )
    if hidden:
        for name, layers in states.items():
            chosen = range(len(layers) - 1, 0, -_EVERY)  # 0 is what the embeddings give
            signals |= {f"{name}.{number}": layers[number] for number in chosen}
    return signals


def find_arguments(call: Call) -> dict[str, Any]:
    """The keyword arguments of a call without those that only its loss needs.

    Labels stay where the model makes the inputs of its decoder from them, or cannot do without. What a method that
    was put in the place of the model's own `forward` takes beside that is left out as well.

    Args:
        call: The call.

    Returns:
        What a model of the same class is to be given.
    """
    module: Any = getattr(call.module, "_orig_mod", call.module)
    parameters = inspect.signature(type(module).forward).parameters
    dropped = {*_LOSS_ARGUMENTS}
    method = vars(module).get("forward")
    while method is not None:  # several may be put upon each other
        dropped |= set(inspect.signature(method, follow_wrapped=False).parameters) - parameters.keys()
        method = getattr(method, "__wrapped__", None)
    decodes = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    is_needed = "labels" in parameters and parameters["labels"].default is inspect.Parameter.empty
    if is_needed or (decodes and not {"decoder_input_ids", "decoder_inputs_embeds"} & call.kwargs.keys()):
        dropped.discard("labels")
    return {name: value for name, value in call.kwargs.items() if name not in dropped}


def _find_logits(outputs: list[Mapping[str, Any]]) -> Signals:
    for output in outputs:
        found = {
            name: value
            for name, value in output.items()
            if "logits" in name and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
        }
        if found:
            return found
    return {}


def _find_embeddings(outputs: list[Mapping[str, Any]]) -> Signals:
    for name, source in zip(EMBEDDINGS, (EMBEDDINGS[0], "last_hidden_state"), strict=True):
        for output in outputs:
            if isinstance(output.get(source), torch.Tensor):
                return {name: output[source]}
    return {}


def _find_states(outputs: list[Mapping[str, Any]]) -> dict[str, tuple[torch.Tensor, ...]]:
    for output in outputs:
        found = {name: output[name] for name in _STATES if output.get(name)}
        if found:
            return found
    return {}


def _complete(call: Call) -> list[Mapping[str, Any]]:
    """Have the head of a model compute the logits that a fused loss did without, from what its base computed."""
    for outer in call.walk():
        model = outer.module
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            continue
        for inner in outer.inner:
            if isinstance(inner.output, Mapping) and inner.output.get("last_hidden_state") is not None:
                with replacing_forward(inner.module, lambda *_, told=inner.output, **__: told):
                    return [model(*outer.args, **find_arguments(outer))]
    return []
