"""How the fields of a default config are made small: rules by their names, and what single types need beyond them."""

import re
from collections.abc import Callable
from typing import Any

VOCAB, HIDDEN, INTERMEDIATE, HEADS, GROUPS, HEAD_DIM, LAYERS = 140, 64, 80, 4, 2, 16, 2

Rule = Callable[[int], int]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit)


def _always(size: int) -> Rule:
    return lambda value: size if value > 0 else value


RULES: tuple[tuple[str, Rule], ...] = (
    (r"image_embedding_size|.*feat_sizes?", _at_most(8)),
    (r"base_channels", _at_most(32)),
    (r"type_vocab_size|modality_type_vocab_size|num_channels|num_channels_out|in_chans", _at_most(8)),
    (r"vocab_size_per_layer_input|.*vocab_sizes?|.*_vocab|num_embeddings", _at_most(VOCAB)),
    (r"(.*_)?codebook_size|upsample_groups", _at_most(64)),
    (r"mamba_d_ssm", _always(2 * HIDDEN)),
    (r"(encoder_|decoder_)?(patch_size|tubelet_size|patch_stride)", _at_most(8)),
    (r"(.*_)?(image|img|crop)_size", _at_most(64)),
    (r"max_2d_position_embeddings", _at_most(1024)),
    (
        r"(.*_)?(max_.*_?positions?(_embeddings)?|n_positions|n_ctx|model_max_length|max_seq_len|context_length)",
        _at_most(128),
    ),
    (r"num_position_embeddings", _always(64)),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|num_key_value_attention_heads|num_query_groups)", _at_most(GROUPS)),
    (r"linear_num_value_heads", _always(HEADS)),
    (r"linear_num_(key_)?heads", _always(GROUPS)),
    (
        r"(.*_)?(attention_heads|num_heads|n_heads?|num_head|heads|num_attention_heads|.*_num_heads|.*_n_heads)",
        _always(HEADS),
    ),
    (r"qk_nope_head_dim", _always(HEAD_DIM)),
    (r"qk_rope_head_dim", _always(HEAD_DIM // 2)),
    (r"qk_head_dim", _always(HEAD_DIM + HEAD_DIM // 2)),
    (r"(.*_)?(head_dim|d_kv|kv_channels|d_head|dim_head|head_size|head_width|headdim)", _always(HEAD_DIM)),
    (r"rotary_dim", _always(HEAD_DIM // 2)),
    (r"q_lora_rank", _always(20)),
    (r"kv_lora_rank", _always(12)),
    (r"(.*_)?rank", _at_most(12)),
    (r"(.*_)?num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|top_?k", _at_most(2)),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group", _always(1)),
    (r"(.*_)?(num_shared_experts|n_shared_experts)", _at_most(1)),
    (r"(.*_)?(num_(local_)?experts|n_routed_experts|moe_num_experts)", _at_most(4)),
    (r"moe_intermediate_size|expert_ffn_hidden_size", _always(24)),
    (r".*shared.*intermediate_size", _always(40)),
    (
        r"(.*_)?(intermediate_(size|dim|size_mlp)|ffn_dim|d_ff|dff|d_inner|n_inner|mlp_dim|dim_ff|dim_feedforward|"
        r"feedforward_dim|(ffn|mlp|feed_forward)_hidden_size|feed_forward_size|linear_units)",
        _always(INTERMEDIATE),
    ),
    (
        r"(.*_)?(dim|hidden_size|hidden_size_per_layer_input|d_model|n_embd|embedding_size|embedding_dimension|"
        r"projection_size|adapter_input_size|d_latents|width|channels|.*_initial_channel|feature_size|output_proj_dims|"
        r"prediction_head_size|pooler_output_size|fpn_.*size)",
        _at_most(HIDDEN),
    ),
    (r"num_.*_labels", _at_most(VOCAB)),
    (r"num_filters", _at_most(2)),
    (r"num_pos_feats", _always(HIDDEN // 2)),
    (r"(.*_)?state_size|(.*_)?d_state|d_conv|n_state", _at_most(8)),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel|num_queries|num_landmarks|num_latents|.*_latents", _at_most(16)),
    (r"(.*_)?window_size", lambda size: 32 if size > 32 else min(size, 2)),
    (r"n_groups|mamba_n_groups|mamba_ngroups", _at_most(GROUPS)),
    (r"sliding_window(_size)?|attention_window|attention_chunk_size|local_attention", _at_most(4)),
    (r"(.*_)?frames|num_frames", _at_most(4)),
    (r"vision_feature_layer", lambda layer: -1),
    (r"num_kv_shared_layers", _at_most(0)),
    (r"first_k_dense_replace|max_window_layers|(.*_)?(layer|block)_offset", _at_most(1)),
    (r"(.*_)?(layer_period|interval|frequency|every_n_layers)", _at_most(2)),
    (r"image_seq_length|mm_tokens_per_image|num_image_tokens", _at_most(64)),
    (r"num_labels", _at_most(3)),
)
"""What becomes of a number (or of each in a list) by its field's name; the first that matches counts."""

LAYER_COUNTS = re.compile(r"(.*_)?(num_.*layers|n_layers?|layers|num_blocks|depth)")
NOT_LAYERS = r"num_feat_extract_layers|num_kv_shared_layers|max_window_layers|aligner_num_add_layers"
MAIN_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "layers")
LAYER_LISTS = r"(?!.*(token|seq|dim))(.*_)?(indexes|indices|idxs|idx|layers|layer_ids?|index|layer|blocks)"
CHANNELS = re.compile(r".*(hidden|dim|channel|embed|width|neck).*|out_features")
STAGES = ("depths", "num_heads", "blocks_per_stage", "hidden_sizes", "stage_num_blocks")
STATE_HEADS = (
    ("expand", "num_heads"),
    ("mamba_expand", "mamba_n_heads"),
    ("mamba_expand", "mamba_num_heads"),
    ("mamba_expand", "n_mamba_heads"),
)
"""The fields with the expansion of a state-space layer and with its heads."""
UNSET = {
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "prediction_length": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
"""What is put where the default config leaves a number open."""
DEPTHS = r"depths|.*num_blocks|blocks_per_stage|.*numb_of_layers|layers|.*block_repeats"

INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
EFFICIENTNET = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}
OVERRIDES: dict[str, dict[str, Any]] = {
    "align": {
        "vision_config.width_coefficient": 0.1,
        "vision_config.depth_coefficient": 0.1,
        "vision_config.hidden_dim": 128,
    },
    "aria": {"projector_patch_to_query_dict": {64: 16, 16: 4}},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "bit": {"num_groups": 8},
    "bros": {"dim_bbox_sinusoid_emb_2d": 32, "dim_bbox_sinusoid_emb_1d": 4, "dim_bbox_projection": HEAD_DIM},
    "chameleon": {
        "vocabulary_map": {"<image>": 100, **{f"IMGIMG{c}Z": 101 + i for i, c in enumerate("ABCDEFGHIJ")}},
        "vq_config.num_embeddings": 10,
    },
    "clap": {"audio_config.patch_embeds_hidden_size": 16},
    "clvp": {"text_config.hidden_size": 2 * HIDDEN, "speech_config.hidden_size": 2 * HIDDEN},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "codegen": {"n_head": 8, "rotary_dim": 8},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.sam_config.downsample_channels": [32, HIDDEN],
    },
    "dia": {"decoder_config.num_channels": 9},
    "efficientnet": EFFICIENTNET,
    "emu3": {
        "vocabulary_map": {
            "<image>": 100,
            "<|extra_200|>": 101,
            **{f"<|visual token {i:06d}|>": 102 + i for i in range(16)},
        },
        "vq_config.codebook_size": 16,
        "vq_config.hidden_size": 128,
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": HEADS},
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},
    "funnel": {"architectures": ["FunnelModel"], "block_sizes": [2, 2, 2]},
    "glmasr": {"audio_config.intermediate_size": 4 * HIDDEN},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "1/2",
    },
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "levit": {"image_size": 128, "patch_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 96},
    "llama4": {"vision_config.intermediate_size": 4 * HIDDEN},
    "mobilebert": {"intra_bottleneck_size": HIDDEN, "true_hidden_size": HIDDEN},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 16},
    "omdet-turbo": {"encoder_in_channels": [24, 32, 40]},
    "qwen2_audio": {"audio_config.max_source_positions": 32},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 40},
    "qwen4_exp": {f"text_config.{name}": size for name, size in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "sam2": {
        "vision_config.backbone_config.global_attention_blocks": [4],
        "vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam2_hiera_det_model": {"global_attention_blocks": [4]},
    "sam2_vision_model": {"backbone_config.global_attention_blocks": [4]},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
    "seggpt": {"num_hidden_layers": 4, "intermediate_hidden_state_indices": [1, 2, 3], "merge_index": 0},
    "superpoint": {"keypoint_decoder_dim": 65},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 64},
    "voxtral": {"audio_config.intermediate_size": 4 * HIDDEN},
    "xlnet": {"d_inner": INTERMEDIATE},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM},
    "zoedepth": {"bottleneck_features": HIDDEN},
    "squeezebert": {"num_attention_heads": 8},
}
"""What a type needs beyond the rules: dotted field name -> value."""
