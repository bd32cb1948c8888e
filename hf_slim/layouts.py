"""What attention and feed-forward modules look like: child names, and nothing about model types.

To teach hf_slim a new layout, add a row. A row names the children of a module by their paths below it. Sizes are read
from the weights; discovery checks that they fit together and that no parameter is left unaccounted for. The first row
that matches a module is taken, so a row with more children stands before one with fewer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A projection that is one of several equal ranges of a fused layer's output.

    Args:
        layer: Path of the fused layer.
        number: Which range, counted from 0.
        of: How many ranges the layer has.
    """

    layer: str
    number: int = 0
    of: int = 1


@dataclass(frozen=True)
class FfnLayout:
    """A feed-forward network: first layers, an elementwise activation (and a gate's product), the second layer.

    Args:
        first: Paths of the layers that make the intermediate channels; two where the network is gated.
        second: Path of FFN2, which reads them.
        fixed: Children beside them that do not depend on the number of channels.
    """

    first: tuple[str, ...]
    second: str
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True)
class MhaLayout:
    """Multi-head attention: query, key and value with the heads one after the other, then the output projection.

    Args:
        query: Where the query projection is.
        key: Where the key projection is.
        value: Where the value projection is.
        output: Path of the output projection.
        fixed: Children that do not depend on the number of heads.
        per_head: Paths of embeddings with one column for each head.
        joint: Name of an attribute. Modules that have it share one attention bias with the same module in the other
            blocks of their stack, so that they lose the same heads.
    """

    query: Part
    key: Part
    value: Part
    output: str
    fixed: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    joint: str | None = None


FFN_LAYOUTS = (
    FfnLayout(("intermediate.dense",), "output.dense", fixed=("output.LayerNorm",)),
    FfnLayout(("gate_proj", "up_proj"), "down_proj"),
    FfnLayout(
        ("fc1",),
        "fc2",
        fixed=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ),
    FfnLayout(("lin1",), "lin2"),
    FfnLayout(("c_fc",), "c_proj"),
    FfnLayout(("wi",), "wo"),
    FfnLayout(("wi_0", "wi_1"), "wo"),
)

MHA_LAYOUTS = (
    MhaLayout(Part("self.query"), Part("self.key"), Part("self.value"), "output.dense", fixed=("output.LayerNorm",)),
    MhaLayout(Part("q_proj"), Part("k_proj"), Part("v_proj"), "o_proj"),
    MhaLayout(Part("q_proj"), Part("k_proj"), Part("v_proj"), "out_proj"),
    MhaLayout(Part("q_lin"), Part("k_lin"), Part("v_lin"), "out_lin"),
    MhaLayout(Part("q_attn"), Part("c_attn", 0, 2), Part("c_attn", 1, 2), "c_proj"),
    MhaLayout(Part("c_attn", 0, 3), Part("c_attn", 1, 3), Part("c_attn", 2, 3), "c_proj"),
    MhaLayout(
        Part("q"),
        Part("k"),
        Part("v"),
        "o",
        per_head=("relative_attention_bias",),
        joint="has_relative_attention_bias",
    ),
)

HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Attributes of an attention module that hold the width of one head."""

QUERY_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Attributes of an attention module that count its query heads."""

KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads",)
"""Attributes of an attention module that count its key-value heads."""

HEAD_WIDTHS = ("all_head_size", "inner_dim", "split_size")
"""Attributes of an attention module that hold the width of all query heads together."""

CHANNEL_COUNTS = ("intermediate_size", "hidden_dim", "ffn_dim")
"""Attributes of a feed-forward module that count its intermediate channels."""

CONFIG_CHANNELS = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "hidden_dim",
    "n_inner",
    "d_ff",
)
"""Fields of a model's config that count intermediate channels."""

CONFIG_HEADS = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "num_decoder_heads",
    "n_head",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
"""Fields of a model's config that count attention heads."""
