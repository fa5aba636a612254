"""The compressed branch: attention among blocks, so that the task's loss reaches the gate.

After Native Sparse Attention (Yuan et al., 2502.11089): the gate's scores are the logits of an attention of query
blocks over the mean values of KV blocks, whose result is added to every token of the block. A causal row sees only the
blocks before its own, as its own holds its future.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def coarse_attention(u: Tensor, w: Tensor, v: Tensor, block_size: int, q_len: int, causal: bool) -> Tensor:
    """(B, H, q_len, D) in u's dtype: every token of a block has its block's result; 0 where a row sees no block.

    Args:
        u: (B, Hkv, num_q_blocks, d), over the temperature.
        w: (B, Hkv, num_kv_blocks, d).
        v: (B, Hkv, Skv, D).
    """
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
    width, found = max(u.shape[3], values.shape[3]), values.shape[3]
    if not u.shape[2]:
        return values.new_zeros(*u.shape[:3], found)
    q, k, v = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (u, w, values))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0)
    return out if found == width else out[..., :found]


def _means(v: Tensor, block_size: int) -> Tensor:
    """(B, Hkv, n, D) mean values of the blocks, a ragged last one over its own tokens."""
    rest = -v.shape[2] % block_size
    if not rest:
        return v.unflatten(2, (-1, block_size)).sum(3) / block_size
    sums = F.pad(v, (0, 0, 0, rest)).unflatten(2, (-1, block_size)).sum(3)
    counts = torch.full((sums.shape[2], 1), block_size, dtype=sums.dtype, device=v.device)
    counts[-1] -= rest
    return sums / counts
