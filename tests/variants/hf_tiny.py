"""Tiny configs of any family of transformers: its own defaults with every size cut down."""

from __future__ import annotations

import re
from typing import Any

VOCAB = 99
# Key of a config -> its size here, the first that matches; what no rule names stays.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size$|^vocab_size|vocab_size_per", VOCAB),
    (r"rope_head_dim|nope_head_dim|v_head_dim|index_head_dim|qk_head_dim", 8),
    (r"_lora_rank$|lora_rank", 16),
    (r"index_topk", 8),
    (r"experts_per_tok|top_?k$|moe_k$|num_selected_experts|top_k_experts|n_activated", 2),
    (r"^n_group$|topk_group|n_shared_experts|num_shared_experts|expert_groups", 1),
    (r"num_(local_|routed_)?experts$|n_routed_experts|moe_num_experts|num_experts_total", 4),
    (r"(kv|key_value|_kv).*heads|heads_kv|multi_query_group_num|n_head_kv", 2),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"state_size|d_state|ssm_state", 8),
    (r"heads$|n_head$|num_head$|n_heads|attention_heads", 4),
    (r"head_dim$|head_size$|^d_kv$|kv_channels|d_head$|attention_head_size|head_width|key_value_dim", 8),
    (r"rotary_dim$", 4),
    (r"intermediate|ffn|d_ff|n_inner|mlp_dim|feed_?forward|fc_dim|d_inner|inner_dim", 48),
    (r"hidden_size_per_layer|embed_proj_dim", 32),
    (r"hidden_size|d_model|n_embd|embed_dim|hidden_dim$|^dim$|emb_dim|embedding_size|embedding_dim|projection_dim", 32),
    (r"dim_per_layer|output_dim|out_hidden_size|output_size|decoder_hidden|mm_embed|d_embed|proj_dim|width$", 32),
    (r"first_k_dense|num_dense_layers|mtp|nextn|num_kv_shared", 0),
    (r"(^|_)(num_)?(hidden_)?layers$|n_layers?$|num_hidden_layers|num_layers|_layers$|^depth$|num_blocks$", 2),
    (r"max_.*position|n_positions|max_seq|n_ctx|seq_length|max_.*length|max_target|max_source|max_.*_pos", 256),
    (r"sliding_window$|window_size|attention_window|chunk_size|local_attention|attn_window", 16),
    (r"image_size|img_size|input_size", 64),
    (r"patch_size", 8),
    (r"num_mel_bins|n_mels|num_bins", 16),
)

GIVEN = {
    "mrope_section": [2, 1, 1],
    "partial_rotary_factor": 1.0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1],
    "index_kpool": 4,
}
DROPPED = ("out_features", "out_indices", "stage_names", "transformers_version")


def tiny(config_class: Any) -> Any:
    """A config of the class with every known size cut down, its parts as well."""
    whole = config_class().to_dict()
    return config_class.from_dict(_cut(whole))


def _cut(values: dict[str, Any]) -> dict[str, Any]:
    depth = next(
        (values[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(values.get(k), int)), 0
    )
    kinds = values.get("layer_types") or values.get("layers_block_type")
    kept = _one_of_each(kinds) if isinstance(kinds, list) else [0, 1]
    return {key: _one(key, value, values, depth, kept) for key, value in values.items() if key not in DROPPED}


def _one(key: str, value: Any, values: dict[str, Any], depth: int, kept: list[int]) -> Any:
    if key in GIVEN:
        return GIVEN[key]
    if key == "head_dim" and value is None:
        return 8
    if key == "num_key_value_heads" and value in (None, values.get("num_attention_heads")):
        return 4
    if key == "per_layer_config" and isinstance(value, dict):
        named = {int(k): v for k, v in value.items()}
        return {new: _cut(named[old]) for new, old in enumerate(kept) if old in named}
    if isinstance(value, dict) and "id2label" not in key and "label2id" not in key:
        return _cut({str(k): v for k, v in value.items()}) if "rope" not in key else _rope(value)
    if isinstance(value, list) and depth > 2 and len(value) == depth:
        return [value[i] for i in kept]
    if key == "depths" and isinstance(value, list):
        return [1] * len(value)
    return _size(key, value, len(kept))


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    cut = {k: _rope(v) if isinstance(v, dict) else GIVEN.get(k, v) for k, v in value.items()}
    return cut | {"mrope_section": GIVEN["mrope_section"]} if "rope_type" in cut else cut


def _size(key: str, value: Any, layers: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or key in ("num_feat_extract_layers", "model_type"):
        return value
    if key.endswith(("_token_id", "_id", "_token", "_token_index", "_index")):
        return min(value, VOCAB - 1)
    for pattern, size in SIZES:
        if re.search(pattern, key):
            return layers if size == 2 and "layer" in key and value > 2 else min(size, value) if value > 0 else value
    return value


def _one_of_each(kinds: list[Any]) -> list[int]:
    """Places of one layer of each kind, in order, and of two at least."""
    first = sorted({kind: len(kinds) - 1 - i for i, kind in enumerate(reversed(kinds))}.values())
    return first if len(first) > 1 else [0, min(1, len(kinds) - 1)]
