"""Continuous batching, whose cache of keys and values has one size for all layers."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..compaction import has_record
from ..structures import find_structures, join


def refuse_other_groups(model: Any) -> None:
    """Refuse a slim model whose layers have other numbers of key-value heads than its config says for all of them.

    The cache of continuous batching is cut by the fields of the config. Where a layer has fewer key-value heads,
    writing to it fails, and `generate_batch` answers with empty texts.

    Args:
        model: The transformers model that is made ready for continuous batching.

    Raises:
        ValueError: If the cache would not fit; the message names the layers.
    """
    config = model.config.get_text_config(decoder=True)
    if not has_record(model.config) and not config.to_dict().get("per_layer_config"):
        return
    grouped = getattr(config, "num_key_value_heads", None)
    expected = config.num_attention_heads if grouped is None else grouped
    with torch.device("meta"):  # weights that were quantized since say less than plain ones
        bare = type(model)(copy.deepcopy(model.config))
    decoder = bare.get_decoder()  # a tower that reads pictures has no cache
    within = next(path for path, module in bare.named_modules() if module is decoder)
    others = [s for s in find_structures(decoder).structures if s.kind == "mha" and s.units != expected]
    if others:
        layers = ", ".join(f"{join(within, s.name)} has {s.units}" for s in others[:3])
        more = f", and {len(others) - 3} more layers have other numbers" if len(others) > 3 else ""
        raise ValueError(
            f"Continuous batching keeps {expected} key-value heads for every layer, as the config of this model says, "
            f"but {layers}{more}. It would answer with empty texts. Use generate() instead; or slim with "
            'mha_sparsity=0 or, where the config has a head_dim, with slim_scope="local", so that all layers have the '
            "one number."
        )
