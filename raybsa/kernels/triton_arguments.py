"""The arguments that every Triton kernel takes after its own tensors, from one checked call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from raybsa.counter import Stream, mix_words
from raybsa.kernels.call import AttentionCall

LOG2E = 1.4426950408889634


def position_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """q_starts, kv_starts: (blocks,) int64 global positions of the blocks at hand where they are a selection."""
    layout = call.layout
    return (
        None if layout.q_block_ids is None else layout.q_block_starts,
        None if layout.kv_block_ids is None else layout.kv_block_starts,
    )


def feature_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """attn_mask and its four strides, both segment_ids and their strides, block_bias."""
    mask, mask_strides = None, (0, 0, 0, 0)
    if call.attn_mask is not None:
        mask = call.attn_mask.view(torch.uint8) if call.attn_mask.dtype == torch.bool else call.attn_mask
        missing = 4 - mask.dim()
        steps = [step if size > 1 else 0 for size, step in zip(mask.shape, mask.stride(), strict=True)]
        mask_strides = tuple([0] * missing + steps)  # type: ignore[assignment]
    q_ids, kv_ids = call.segment_ids or (None, None)
    ids_strides = (0, 0) if q_ids is None else q_ids.stride()
    ids_strides += (0, 0) if kv_ids is None else kv_ids.stride()
    return (mask, *mask_strides, q_ids, kv_ids, *ids_strides)


def number_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """heads, queries_per_kv, q_tokens, kv_tokens, scale in base 2, and dropout's hash base, threshold and factor."""
    return (
        call.q.shape[1],
        call.queries_per_kv,
        call.q.shape[2],
        call.k.shape[2],
        call.scale * LOG2E,
        *_dropout_arguments(call.seed, call.dropout_p),
    )


def constants(call: AttentionCall, rows: int, cols: int, padded_head_dim: int) -> dict[str, Any]:
    """What the kernels are compiled for, beyond the types of their tensors."""
    layout = call.layout
    return {
        "Q_BLOCK": layout.q_block_size,
        "KV_BLOCK": layout.kv_block_size,
        "ROWS": rows,
        "COLS": cols,
        "D": call.q.shape[-1],
        "DP": padded_head_dim,
        "CAUSAL": layout.causal,
        "Q_RAGGED": layout.q_tokens % layout.q_block_size != 0,
        "KV_RAGGED": layout.kv_tokens % layout.kv_block_size != 0,
        "DROPOUT": call.dropout_p > 0.0,
        "PRECISION": dot_precision(call.q.dtype),
    }


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32 unless torch allows TF32 (``torch.set_float32_matmul_precision``)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@lru_cache(maxsize=1024)
def _dropout_arguments(seed: int, p: float) -> tuple[int, int, float]:
    """The hash of (seed, stream) as int32, the least 24-bit number that is kept, and ``1 / (1 - p)``."""
    base = mix_words(seed, int(Stream.DROPOUT))
    return base - 2**32 if base >= 2**31 else base, _threshold(p), 1.0 / (1.0 - p)


def _threshold(p: float) -> int:
    """The least k for which float32 ``k / 2**24 >= p``, by torch's own comparison."""
    near = max(0, math.floor(p * 2**24) - 2)
    numbers = torch.arange(near, near + 5, device="cpu")
    return near + int((numbers.to(torch.float32) * 2.0**-24 < p).sum())


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """All strides of (B, H, S, D) tensors, one after another."""
    return tuple(step for tensor in tensors for step in tensor.stride())
