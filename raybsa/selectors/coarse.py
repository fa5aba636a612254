"""The compressed branch: attention among blocks, so that the task's loss reaches the gate.

After Native Sparse Attention (Yuan et al., 2502.11089): the gate's scores are the logits of an attention of query
blocks over the mean values of KV blocks, whose result is added to every token of the block. A causal row sees only the
blocks before its own, as its own holds its future. Where there are masks, a row sees only the blocks that it judges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.kernels.api import block_sparse_attention
from raybsa.selectors.pooling import taken_blocks
from raybsa.selectors.shape import dense_layout
from raybsa.selectors.visibility import Visibility


def coarse_attention(
    u: Tensor, w: Tensor, v: Tensor, block_size: int, q_len: int, causal: bool, visible: Visibility | None = None
) -> Tensor:
    """(B, Hkv, q_len, D) in u's dtype: every token of a block has its block's result; 0 where a row sees no block.

    Args:
        u: (B, Hkv, num_q_blocks, d), over the temperature.
        w: (B, Hkv, num_kv_blocks, d).
        v: (B, Hkv, Skv, D).
        visible: what the rows may look at; None: all.
    """
    if visible is not None:
        out = _attend_visible(u, w, _visible_means(v, block_size, visible).to(u.dtype), causal, visible)
        out = out.repeat_interleave(block_size, 2)[:, :, :q_len]
        return out if visible.masks is None else torch.where(visible.masks.sees[..., None], out, 0.0)
    values = _means(v, block_size).to(u.dtype)
    rows, columns = u.shape[2], w.shape[2]
    if causal:  # row i + 1 sees columns 0 .. i
        seen = min(rows - 1, columns)
        out = F.pad(_attend(u[:, :, 1 : seen + 1], w[:, :, :seen], values[:, :, :seen], True), (0, 0, 1, 0))
        if seen + 1 < rows:
            out = torch.cat([out, _attend(u[:, :, seen + 1 :], w, values, False)], 2)
    else:
        out = _attend(u, w, values, False)
    return out.repeat_interleave(block_size, 2)[:, :, :q_len]


def _attend(u: Tensor, w: Tensor, values: Tensor, causal: bool) -> Tensor:
    """SDPA with one width for all, which its kernels need to work in O(n) memory."""
    if not u.shape[2]:
        return values.new_zeros(*u.shape[:3], values.shape[3])
    q, k, v = _of_one_width(u, w, values)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)[..., : values.shape[3]]


def _attend_visible(u: Tensor, w: Tensor, values: Tensor, causal: bool, visible: Visibility) -> Tensor:
    """The same over the pairs of blocks that are judged: blocks are the tokens, and the masks theirs."""
    attn_mask, segment_ids = visible.among_blocks()
    if causal:
        attn_mask = attn_mask if attn_mask is None or attn_mask.shape[2] == 1 else attn_mask[:, :, 1:]
        segment_ids = None if segment_ids is None else (segment_ids[0][:, 1:], segment_ids[1])
        u = u[:, :, 1:]
    if not u.shape[2]:
        return values.new_zeros(*u.shape[:2], 1, values.shape[3])
    q, k, v = _of_one_width(u, w, values)
    layout = dense_layout(q.shape[2], k.shape[2], causal, q.device)
    out = block_sparse_attention(q, k, v, layout, scale=1.0, attn_mask=attn_mask, segment_ids=segment_ids)
    assert isinstance(out, Tensor)
    out = out[..., : values.shape[3]]
    return F.pad(out, (0, 0, 1, 0)) if causal else out


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    width = max(x.shape[3] for x in tensors)
    return [x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in tensors]


def _visible_means(v: Tensor, block_size: int, visible: Visibility) -> Tensor:
    """(B, Hkv, n, D) mean values of the tokens over which the blocks' keys are pooled."""
    if visible.keys is None:
        return _means(v, block_size)
    blocks, taken = taken_blocks(v, block_size, visible.keys)
    return torch.where(taken, blocks, 0.0).sum(3) / taken.sum(3).clamp(min=1)


def _means(v: Tensor, block_size: int) -> Tensor:
    """(B, Hkv, n, D) mean values of the blocks, a ragged last one over its own tokens."""
    rest = -v.shape[2] % block_size
    if not rest:
        return v.unflatten(2, (-1, block_size)).sum(3) / block_size
    sums = F.pad(v, (0, 0, 0, rest)).unflatten(2, (-1, block_size)).sum(3)
    counts = torch.full((sums.shape[2], 1), block_size, dtype=sums.dtype, device=v.device)
    counts[-1] -= rest
    return sums / counts
