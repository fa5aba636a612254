"""The dense weights that ``need_weights=True`` asks for: O(Sq * Skv) memory, as in nn.MultiheadAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.counter import Stream, uniform
from raybsa.kernels.call import AttentionCall, compute_dtype
from raybsa.kernels.reference import token_mask
from raybsa.layout import BlockLayout


def attention_weights(call: AttentionCall, extra_keys: Tensor | None) -> Tensor:
    """(B, H, Sq, Skv + E) in q's dtype: the weights that ``call`` gives its values, dropout included.

    They sum to 1 over the kept blocks (before dropout); a query with nothing to attend has weights 0. Differentiable.

    Args:
        call: the arguments; k and v have as many heads as q.
        extra_keys: (B, H, E, D) keys that every query sees, or None.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        scores = _scores(call)
        if extra_keys is not None:
            extra = call.q.to(scores.dtype) @ extra_keys.to(scores.dtype).transpose(-1, -2) * call.scale
            scores = torch.cat([scores, extra], -1)
        alive = (scores != float("-inf")).any(-1, keepdim=True)
        weights = torch.softmax(torch.where(alive, scores, 0.0), -1) * alive
        if call.dropout_p:
            weights = weights * dropout_factor(call, range(weights.shape[-1]))
        return weights.to(call.q.dtype)


def dropout_factor(call: AttentionCall, columns: range) -> Tensor:
    """(B, H, Sq, len(columns)) float32: 0 for weights that dropout takes, ``1 / (1 - p)`` for the rest."""
    batch, heads, q_len, _ = call.q.shape
    device = call.q.device
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row = torch.arange(q_len, device=device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=device)
    kept = uniform(call.seed, Stream.DROPOUT, head, row, column) >= call.dropout_p
    return kept / (1.0 - call.dropout_p)


def _scores(call: AttentionCall) -> Tensor:
    """(B, H, Sq, Skv) in the compute dtype, -inf where a query does not see a key."""
    dtype = compute_dtype(call.q.dtype)
    scores = call.q.to(dtype) @ call.k.to(dtype).transpose(-1, -2) * call.scale
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        scores = scores + call.attn_mask.to(dtype)
    if call.block_bias is not None:
        scores = scores + _token_bias(call.layout, call.block_bias.to(dtype), *call.q.shape[:2])
    return scores.masked_fill(~token_mask(call), float("-inf"))


def _token_bias(layout: BlockLayout, block_bias: Tensor, batch: int, heads: int) -> Tensor:
    """(B or 1, H or 1, Sq, Skv)."""
    blocks = block_bias.new_zeros(layout.num_groups, layout.num_q_blocks, layout.num_kv_blocks)
    tokens = blocks.index_put(layout.coordinates(), block_bias)
    tokens = tokens.repeat_interleave(layout.q_block_size, 1).repeat_interleave(layout.kv_block_size, 2)
    groups = {1: (1, 1), heads: (1, heads)}.get(layout.num_groups, (batch, heads))
    return tokens[:, : layout.q_len, : layout.kv_len].unflatten(0, groups)
