"""Statistics of blocks in one pass over q or k, on a GPU. No gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_launch import launcher


def pooled(x: Tensor, block_size: int) -> Tensor:
    """(B, H, n, 3, D) float32, as ``block_stats``."""
    batch, heads, tokens, head_dim = x.shape
    blocks = triton.cdiv(tokens, block_size)
    out = torch.empty(batch, heads, blocks, 3, head_dim, dtype=torch.float32, device=x.device)
    constants = (block_size, head_dim, triton.next_power_of_2(head_dim))
    launch = launcher(pool_kernel, (x, out), x.stride(), constants)
    launch((blocks, batch * heads), (x, out), (heads, tokens, blocks))
    return out


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def pool_kernel(
    x,
    out,
    x_b,
    x_h,
    x_t,
    x_d,
    heads,
    tokens,
    blocks,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (block, flat head)."""
    block, flat = tl.program_id(0), tl.program_id(1)
    place, dim = tl.arange(0, BLOCK), tl.arange(0, DP)
    token = block * BLOCK + place
    inside = (token < tokens)[:, None]
    base = x + (flat // heads).to(tl.int64) * x_b + (flat % heads).to(tl.int64) * x_h
    pointers = base + token.to(tl.int64)[:, None] * x_t + dim[None, :] * x_d
    values = tl.load(pointers, mask=inside & (dim < D)[None, :], other=0.0).to(tl.float32)
    count = tl.minimum(tokens - block * BLOCK, BLOCK)
    target = out + (flat.to(tl.int64) * blocks + block) * 3 * D + dim
    tl.store(target, tl.sum(values, 0) / count, mask=dim < D)
    tl.store(target + D, tl.max(tl.where(inside, values, float("-inf")), 0), mask=dim < D)
    tl.store(target + 2 * D, tl.sum(tl.where((place == 0)[:, None], values, 0.0), 0), mask=dim < D)
