"""The specification: dense attention over the layout's tokens, up to float64, differentiable by autograd alone.

No other backend imports it, and it shares no arithmetic with them. O(Sq * Skv) memory: for tests and small shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.counter import Stream, uniform
from raybsa.kernels.call import AttentionCall, compute_dtype


def why_not(call: AttentionCall) -> str | None:
    """The reference serves every call."""
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) in the compute dtype."""
    scores = masked_scores(call)
    weights = softmax(scores)
    blind = (scores == float("-inf")).all(-1)
    lse = _logsumexp(scores.masked_fill(blind[..., None], 0.0)).masked_fill(blind, float("-inf"))
    if call.dropout_p:
        weights = weights * dropout_factor(call, token_positions(call)[1])
    values = call.v.to(weights.dtype).repeat_interleave(call.queries_per_kv, dim=1)
    return (weights @ values).to(call.q.dtype), lse


def _logsumexp(scores: Tensor) -> Tensor:
    """torch's own has gradients ``exp(score - lse)``, which sum to more than 1 where lse is so large (a mask of
    ``finfo.min``) that it holds no logarithm beside it."""
    top = scores.detach().amax(-1, keepdim=True)
    return torch.log(torch.exp(scores - top).sum(-1)) + top[..., 0]


def masked_scores(call: AttentionCall) -> Tensor:
    """(B, H, Sq, Skv) in the compute dtype: scaled, biased, and -inf where a query does not see a key."""
    dtype = compute_dtype(call.q.dtype)
    keys = call.k.to(dtype).repeat_interleave(call.queries_per_kv, dim=1)
    scores = call.q.to(dtype) @ keys.transpose(-1, -2) * call.scale
    if call.block_bias is not None:
        scores = scores + _token_bias(call, dtype)
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        scores = scores + call.attn_mask.to(dtype)
    return scores.masked_fill(~token_mask(call), float("-inf"))


def softmax(scores: Tensor) -> Tensor:
    """The weights of (..., Skv) scores; all 0 in a row that sees nothing."""
    sees = (scores != float("-inf")).any(-1, keepdim=True)
    return torch.softmax(torch.where(sees, scores, 0.0), -1) * sees


def dropout_factor(call: AttentionCall, columns: Tensor) -> Tensor:
    """(B, H, Sq, n) in the compute dtype: 0 for the weights that dropout takes, ``1 / (1 - p)`` for the rest.

    Drawn from (seed, b * H + h, global row, global column); ``columns`` (n,) are global key positions.
    """
    assert call.seed is not None
    batch, heads = call.q.shape[:2]
    head = torch.arange(batch * heads, device=call.q.device).view(batch, heads, 1, 1)
    rows = token_positions(call)[0][:, None]
    kept = uniform(call.seed, Stream.DROPOUT, head, rows, columns) >= call.dropout_p
    return kept.to(compute_dtype(call.q.dtype)) / (1.0 - call.dropout_p)


def token_mask(call: AttentionCall) -> Tensor:
    """(B or 1, H or 1, Sq, Skv) bool: the pairs that blocks, causality, attn_mask and segments all let through."""
    layout = call.layout
    mask = _to_tokens(call, layout.to_dense())
    q_position, kv_position = token_positions(call)
    if layout.causal:
        mask = mask & (kv_position[None, :] <= q_position[:, None])
    if call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        mask = mask & call.attn_mask
    if call.segment_ids is not None:
        q_segment, kv_segment = call.segment_ids
        mask = mask & (q_segment[:, None, :, None] == kv_segment[:, None, None, :])
    return mask


def token_positions(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(Sq,) and (Skv,) int64: global positions of the tokens at hand."""
    layout = call.layout
    q_position = layout.q_block_starts[:, None] + torch.arange(layout.q_block_size, device=layout.device)
    kv_position = layout.kv_block_starts[:, None] + torch.arange(layout.kv_block_size, device=layout.device)
    return q_position.reshape(-1)[: layout.q_tokens], kv_position.reshape(-1)[: layout.kv_tokens]


def _to_tokens(call: AttentionCall, blocks: Tensor) -> Tensor:
    """(G, nQ, nKV) -> (B or 1, H or 1, Sq, Skv)."""
    layout = call.layout
    tokens = blocks.repeat_interleave(layout.q_block_size, 1).repeat_interleave(layout.kv_block_size, 2)
    tokens = tokens[:, : layout.q_tokens, : layout.kv_tokens]
    batch, heads = call.q.shape[:2]
    groups = (1, 1) if layout.num_groups == 1 else (1, heads) if layout.num_groups == heads else (batch, heads)
    return tokens.unflatten(0, groups)


def _token_bias(call: AttentionCall, dtype: torch.dtype) -> Tensor:
    layout = call.layout
    assert call.block_bias is not None
    shape = (layout.num_groups, layout.num_q_blocks, layout.num_kv_blocks)
    blocks = torch.zeros(shape, dtype=dtype, device=layout.device)
    return _to_tokens(call, blocks.index_put(layout.coordinates(), call.block_bias.to(dtype)))
