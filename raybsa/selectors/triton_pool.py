"""Statistics of blocks in one pass over q or k, on a GPU. No gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_launch import launcher

AT_ONCE = 4096  # numbers


def pooled(x: Tensor, block_size: int) -> Tensor:
    """(B, H, n, 3, D) float32, as ``block_stats``."""
    batch, heads, tokens, head_dim = x.shape
    blocks = triton.cdiv(tokens, block_size)
    out = torch.empty(batch, heads, blocks, 3, head_dim, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(head_dim)
    constants = (block_size, chunk_of(block_size, padded), head_dim, padded)
    launch = launcher(pool_kernel, (x, out), x.stride(), constants)
    launch((blocks, batch * heads), (x, out), (heads, tokens, blocks))
    return out


def chunk_of(block_size: int, padded: int) -> int:
    """Tokens of ``padded`` numbers that a program holds at one time."""
    return max(1, min(block_size, AT_ONCE // padded))


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
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (block, flat head)."""
    block, flat = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, DP)
    base = x + (flat // heads).to(tl.int64) * x_b + (flat % heads).to(tl.int64) * x_h
    mean, top = statistics(base, block, tokens, x_t, x_d, BLOCK, CHUNK, D, DP)
    target = out + (flat.to(tl.int64) * blocks + block) * 3 * D + dim
    tl.store(target, mean, mask=dim < D)
    tl.store(target + D, top, mask=dim < D)
    tl.store(target + 2 * D, first_token(base, block, x_t, x_d, BLOCK, D, DP), mask=dim < D)


@triton.jit
def statistics(
    base, block, tokens, x_t, x_d, BLOCK: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Mean and maximum of a block's tokens, 0 for the block before the first."""
    dim, place = tl.arange(0, DP), tl.arange(0, CHUNK)
    total = tl.zeros([DP], tl.float32)
    top = tl.full([DP], float("-inf"), tl.float32)
    for start in tl.static_range(0, BLOCK, CHUNK):
        token = block * BLOCK + start + place
        inside = ((token >= 0) & (token < tokens))[:, None] & (dim < D)[None, :]
        pointers = base + token.to(tl.int64)[:, None] * x_t + dim[None, :] * x_d
        values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(values, 0)
        top = tl.maximum(top, tl.max(tl.where(inside, values, float("-inf")), 0))
    count = tl.minimum(tokens - block * BLOCK, BLOCK)
    return total / count, tl.where((block >= 0) & (dim < D), top, 0.0)


@triton.jit
def first_token(base, block, x_t, x_d, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """(DP,) float32 of a block's first token."""
    dim = tl.arange(0, DP)
    at = base + (block * BLOCK).to(tl.int64) * x_t + dim * x_d
    return tl.load(at, mask=dim < D, other=0.0).to(tl.float32)
