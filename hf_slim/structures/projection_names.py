"""What attention and feed-forward modules look like: child names, and nothing about model types.

To teach hf_slim a new layout, add a row, or `register_layout` one. A row names the children of a module by their paths
below it. Sizes are read from the weights; discovery checks that they fit together and that nothing that depends on
them is left unaccounted for. Of the rows that match a module the one with the most children is taken; of those the
first.
"""

from __future__ import annotations

from typing import TypeVar

from .layout_rows import FfnLayout, Fused, MhaLayout

FFN_LAYOUTS = (
    FfnLayout(("gate_proj", "up_proj"), "down_proj", between=("ffn_sub_norm",)),
    FfnLayout(("gate_up_proj",), "down_proj"),
    FfnLayout(("up_proj",), "down_proj"),
    FfnLayout(("gate_proj",), "down_proj"),
    FfnLayout(("intermediate.dense",), "output.dense"),
    FfnLayout(("intermediate_query.dense",), "output_query.dense"),
    FfnLayout(("intermediate",), "output"),
    FfnLayout(("intermediate_dense",), "output_dense"),
    FfnLayout(("fc1",), "fc2", between=("dwconv",)),
    FfnLayout(("fc1.proj",), "fc2"),
    FfnLayout(("intermediate.conv1d",), "output.conv1d"),
    FfnLayout(("lin1",), "lin2"),
    FfnLayout(("linear1",), "linear2"),
    FfnLayout(("linear_1",), "linear_2"),
    FfnLayout(("linear_fc1",), "linear_fc2"),
    FfnLayout(("dense1",), "dense2", between=("dwconv",)),
    FfnLayout(("layer_1",), "layer_2"),
    FfnLayout(("ffw_layer_1",), "ffw_layer_2"),
    FfnLayout(("conv1",), "conv2", alone=True),
    FfnLayout(("conv_1",), "conv_2", alone=True),
    FfnLayout(("proj_up_gate", "proj_up"), "proj_down"),
    FfnLayout(("dense.dense",), "output.dense"),
    FfnLayout(("conv1.convolution",), "conv2.convolution", alone=True),
    FfnLayout(("proj_in",), "proj_out", alone=True),
    FfnLayout(("layers.0",), "layers.1", alone=True),
    FfnLayout(("ffn.0",), "ffn.2"),
    FfnLayout(("ff.0",), "ff.3"),
    FfnLayout(("pwconv1",), "pwconv2"),
    FfnLayout(("pointwise_conv1",), "pointwise_conv2"),
    FfnLayout(("c_fc",), "c_proj"),
    FfnLayout(("fc_in",), "fc_out"),
    FfnLayout(("ffn",), "ffn_output"),
    FfnLayout(("dense_h_to_4h",), "dense_4h_to_h"),
    FfnLayout(("input_linear",), "output_linear"),
    FfnLayout(("in_proj",), "out_proj", alone=True),
    FfnLayout(("wi_0", "wi_1"), "wo"),
    FfnLayout(("wi",), "wo"),
    FfnLayout(("Wi",), "Wo"),
    FfnLayout(("w1", "w3"), "w2"),
    FfnLayout(("w1",), "w2"),
    FfnLayout(("w_in.w_0", "w_in.w_1"), "w_out"),
)

MHA_LAYOUTS = (
    MhaLayout(
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj", "out_proj", "proj", "projection_layer", "Wo", "dense", "post", "output_projection.o_proj"),
    ),
    MhaLayout(("q_gate_proj", "kv_b_proj"), ("o_proj",)),
    MhaLayout(("q_b_proj", "kv_b_proj"), ("o_proj",)),
    MhaLayout(("q_proj", "kv_b_proj"), ("o_proj",)),
    MhaLayout(("self.query", "self.key", "self.value"), ("output.dense",)),
    MhaLayout(("self.query", "self.key", "self.value"), ("output",)),
    MhaLayout(("attention.query", "attention.key", "attention.value"), ("output.dense", "post_attention.conv1d")),
    MhaLayout((Fused("attention.qkv"),), ("output.dense",)),
    MhaLayout(("self.query_proj", "self.key_proj", "self.value_proj"), ("output.dense",)),
    MhaLayout((Fused("self.in_proj", by_unit=True),), ("output.dense",)),
    MhaLayout(("query", "key", "value"), ("output",), joint="has_relative_attention_bias"),
    MhaLayout(("query", "key", "value"), ("out_proj", "dense", "output", "proj", "projection")),
    MhaLayout(("query_proj", "key_proj", "value_proj"), ("out_proj",)),
    MhaLayout(("q_lin", "k_lin", "v_lin"), ("out_lin",)),
    MhaLayout(("linear_q", "linear_k", "linear_v"), ("linear_out",)),
    MhaLayout(("project_q", "project_k", "project_v"), ("attention_out",)),
    MhaLayout(("Wq", "Wk", "Wv"), ("dense",)),
    MhaLayout(("to_q", "to_k", "to_v"), ("to_out", "to_out.0")),
    MhaLayout(("to_q", Fused("to_kv", "kv")), ("to_out",)),
    MhaLayout(("q_head", "k_head", "v_head"), ("post_proj",)),
    MhaLayout(("q", "k", "v"), ("o",), joint="has_relative_attention_bias"),
    MhaLayout(("q", "k", "v"), ("o", "proj")),
    MhaLayout((Fused("query_key_value", by_unit=True),), ("dense",)),
    MhaLayout((Fused("qkv_proj", "qvk", copies=4),), ("out_proj",), having="embed_positions"),
    MhaLayout((Fused("qkv_proj", "qvk", copies=4),), ("out_proj",), having="mp_num", widths=("embed_dim",)),
    MhaLayout((Fused("qkv_proj"),), ("o_proj",)),
    MhaLayout((Fused("qkv"),), ("proj", "projection")),
    MhaLayout((Fused("Wqkv"),), ("Wo", "out_proj")),
    MhaLayout((Fused("att_proj"),), ("out_proj",)),
    MhaLayout(("q_attn", Fused("c_attn", "kv")), ("c_proj",)),
    MhaLayout((Fused("c_attn", by_unit=True),), ("c_proj",), having="multi_query"),
    MhaLayout((Fused("c_attn"),), ("c_proj",)),
)

HEAD_LAYERS = (
    "gate_proj",
    "g_proj",
    "output_projection.gate_proj",
    "query_global",
    "key_global",
    "value_global",
    "pos_key_proj",
    "pos_query_proj",
    "pos_proj",
    "pos_q_proj",
    "linear_pos",
    "relative_k_proj",
    "r_proj",
    "sink_proj",
    "e2e_query",
    "e2w_query",
    "w2e_query",
)
"""Children of an attention module whose outputs belong to heads, each to an equal range."""

HEAD_TENSORS = {
    "sinks": 0,
    "gate_bias": 0,
    "softmax_scaling.scale": 0,
    "softmax_scaling.bias": 0,
    "k_sconv.conv1d.weight": 0,
    "v_sconv.conv1d.weight": 0,
    "conv.weight": 0,
    "fsmn.conv.weight": 0,
    "q_bias": 0,
    "v_bias": 0,
    "pos_bias_u": 0,
    "pos_bias_v": 0,
    "bias_u": 0,
    "bias_v": 0,
    "r_w_bias": 0,
    "r_r_bias": 0,
    "r_s_bias": 0,
    "r_kernel": 1,
    "r": 1,
    "seg_embed": 1,
    "logit_scale": 0,
    "relative_position_bias_table": 1,
    "relative_position_bias.relative_position_bias_table": 1,
    "relative_attention_bias.weight": 1,
    "global_relative_attention_bias.weight": 1,
    "continuous_position_bias_mlp.2.weight": 0,
}
"""Parameters of an attention module with positions that belong to heads, and the dimension of these positions."""

SHARED_TABLES = {
    "relative_attention_bias.weight": 1,
    "position_bias.relative_attention_bias": 1,
    "relative_position_bias.relative_position_bias_table": 1,
    "shared_position_bias.relative_position_bias_table": 1,
    "rel_pos_bias.weight": 0,
    "rel_pos_x_bias.weight": 0,
    "rel_pos_y_bias.weight": 0,
    "box_rpb_embed_x.layer2.weight": 0,
    "box_rpb_embed_x.layer2.bias": 0,
    "box_rpb_embed_y.layer2.weight": 0,
    "box_rpb_embed_y.layer2.bias": 0,
    "relative_bias.biases.0.relative_attention_bias.weight": 1,
    "relative_bias.biases.1.relative_attention_bias.weight": 1,
    "relative_bias.biases.2.relative_attention_bias.weight": 1,
}
"""Attention biases beside a stack's blocks, shared by all of them, and the dimension whose positions are heads."""

HEAD_NORMS = (
    "q_norm",
    "k_norm",
    "v_norm",
    "qk_norm",
    "q_layernorm",
    "k_layernorm",
    "query_layernorm",
    "key_layernorm",
    "q_layer_norm",
    "k_layer_norm",
    "attn_sub_norm",
)
"""Norms of query, key, value or the heads' outputs: over each head by itself or over all of them together."""

FIXED = (
    "output.LayerNorm",
    "LayerNorm",
    "layer_norm",
    "ln",
    "layernorm1",
    "layernorm2",
    "self_attn_layer_norm",
    "pre_norm",
    "norm",
    "q_a_proj",
    "q_a_layernorm",
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "rotary_emb",
    "rotary_fn",
    "embed_positions",
    "rel_pos_h",
    "rel_pos_w",
    "rel_pos_emb",
    "emb_rel_k",
    "emb_rel_v",
    "scaling",
    "per_dim_scale",
    "softcap",
    "k_rope_only_layernorm",
    "post_attention.layernorm",
    "continuous_position_bias_mlp.0",
    "distance_embedding",
    "self.distance_embedding",
    "indexer",
    "bias",
    "masked_bias",
    "relative_position_index",
    "relative_position_bias.relative_position_index",
    "relative_coords_table",
    "sr",
    "sequence_reduction",
    "spatial_reduction",
    "global_input_layer_norm",
)
"""Children and tensors of an attention module that do not depend on its number of heads."""

HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head")
"""Attributes of an attention module that hold the width of one head."""

QUERY_HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_attn_heads",
    "attention_heads",
    "heads",
)
"""Attributes of an attention module that count its query heads."""

KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "kv_heads")
"""Attributes of an attention module that count its key-value heads."""

GROUP_SIZES = ("num_key_value_groups", "num_kv_groups")
"""Attributes of an attention module that hold the number of query heads for each key-value head."""

HEAD_WIDTHS = ("all_head_size", "inner_dim", "split_size")
"""Attributes of an attention module that hold the width of all query heads together."""

CHANNEL_COUNTS = (
    "intermediate_size",
    "intermediate_dim",
    "hidden_dim",
    "ffn_dim",
    "expert_dim",
    "ffn_hidden_size",
    "up_proj_dim",
)
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

Layout = TypeVar("Layout", FfnLayout, MhaLayout)
_registered: list[FfnLayout | MhaLayout] = []


def register_layout(layout: FfnLayout | MhaLayout) -> None:
    """Teach discovery, in this process, what attention or feed-forward networks of a class look like.

    Of the rows that match a module the one with the most children is taken; of those with equally many the one that
    was registered last, and the built-in ones come after. What a row matches has to be accounted for as ever, and code
    that is not of transformers is tried before it is slimmed.

    Args:
        layout: The names of the children.

    Raises:
        ValueError: If it is no layout, or is known already.
    """
    paths: dict[str, tuple[str | Fused, ...]]
    if isinstance(layout, FfnLayout):
        paths = {"first": layout.first, "second": (layout.second,)}
    elif isinstance(layout, MhaLayout):
        paths = {"inputs": layout.inputs, "outputs": layout.outputs}
    else:
        raise ValueError(
            f"A layout is needed, got {layout!r}: make an FfnLayout or an MhaLayout of a module's children."
        )
    for name, value in paths.items():
        if not isinstance(value, tuple) or not all(value) or not value:
            raise ValueError(
                f"{name} of a layout must be a tuple of paths, got {value!r}: one alone is written (path,)."
            )
    if layout in (*_registered, *FFN_LAYOUTS, *MHA_LAYOUTS):
        raise ValueError(f"This layout is known already, leave the call out: {layout}.")
    _registered.insert(0, layout)


def layouts_of(kind: type[Layout]) -> list[Layout]:
    """The rows of one kind, registered and built in.

    Args:
        kind: `FfnLayout` or `MhaLayout`.

    Returns:
        The rows in the order in which they are tried.
    """
    rows = [row for row in (*_registered, *FFN_LAYOUTS, *MHA_LAYOUTS) if isinstance(row, kind)]
    return sorted(rows, key=lambda row: -row.size)
