"""A gate's vectors straight from q and k, on a GPU: statistics of blocks, products and waves in one launch each.

What ``block_stats``, ``query_features`` or ``key_features`` and ``Gate.queries`` or ``Gate.keys`` do in a dozen
operations, of which each takes as long to launch as to run. No gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_launch import launcher
from raybsa.selectors.gate import Gate
from raybsa.selectors.triton_pool import chunk_of, first_token, statistics

PRODUCTS_A_WARP = 2048  # that a program holds: fewer warps, since sums need no barrier within one


def gated(q: Tensor, k: Tensor, gate: Gate, waves: Tensor, block_size: int, causal: bool) -> tuple[Tensor, Tensor]:
    """u (B, Hkv, num_q_blocks, d) and w (B, Hkv, num_kv_blocks, d), float32; block scores are ``u @ w.T``.

    Args:
        q, k: (B, H, Sq, D) and (B, Hkv, Skv, D).
        gate: in float32.
        waves: ``position_waves`` of as many blocks as the longer one has.
        block_size: tokens.
        causal: queries look at the block before their own and at the first token of their own.
    """
    u = _launch(q, gate.query, waves, None, k.shape[1], block_size, causal)
    return u, _launch(k, gate.key, waves, gate.waves, k.shape[1], block_size, False)


def _launch(
    x: Tensor, weight: Tensor, waves: Tensor, slopes: Tensor | None, groups: int, block_size: int, causal: bool
) -> Tensor:
    """u or, with ``slopes``, w; a parameter is contiguous."""
    batch, heads, tokens, head_dim = x.shape
    blocks, gate_dim, count = triton.cdiv(tokens, block_size), weight.shape[-1], waves.shape[-1]
    out = torch.empty(batch, groups, blocks, gate_dim + 2 * count, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(head_dim)
    chunk = chunk_of(block_size, padded)
    sizes = (block_size, chunk, head_dim, padded, gate_dim, triton.next_power_of_2(gate_dim))
    constants = (*sizes, count, triton.next_power_of_2(count), heads // groups, causal, slopes is not None)
    tensors = (x, weight, waves, slopes, out)
    warps = max(1, padded * triton.next_power_of_2(gate_dim) // PRODUCTS_A_WARP)
    launch = launcher(gate_kernel, tensors, x.stride(), constants, warps)
    launch((blocks, batch * groups), tensors, (groups, tokens, blocks))
    return out


@triton.jit
def _products(vector, weight, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, GP: tl.constexpr):
    """(DP, GP), to be summed over the first: a vector (DP,) and the (D, G) matrix at ``weight``."""
    dim, to = tl.arange(0, DP)[:, None], tl.arange(0, GP)[None, :]
    return vector[:, None] * tl.load(weight + dim * G + to, mask=(dim < D) & (to < G), other=0.0)


@triton.jit(do_not_specialize=["groups", "tokens", "blocks"])
def gate_kernel(
    x,
    weight,
    waves,
    slopes,
    out,
    x_b,
    x_h,
    x_t,
    x_d,
    groups,
    tokens,
    blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    WAVES: tl.constexpr,
    WP: tl.constexpr,
    COPIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (block, flat KV head)."""
    block, flat = tl.program_id(0), tl.program_id(1)
    group = flat % groups
    STATS: tl.constexpr = 4 if KEYS else 3
    to = tl.arange(0, GP)
    products = tl.zeros([DP, GP], tl.float32)
    for copy in tl.static_range(COPIES):
        base = x + (flat // groups).to(tl.int64) * x_b + (group * COPIES + copy).to(tl.int64) * x_h
        matrix = weight + (group * COPIES + copy) * STATS * D * G
        mean, top = statistics(base, block if KEYS else block - CAUSAL, tokens, x_t, x_d, BLOCK, CHUNK, D, DP)
        products += _products(mean, matrix, D, DP, G, GP) + _products(top, matrix + D * G, D, DP, G, GP)
        matrix += 2 * D * G
        if KEYS:
            mean, top = statistics(base, block - 1, tokens, x_t, x_d, BLOCK, CHUNK, D, DP)
            products += _products(mean, matrix, D, DP, G, GP) + _products(top, matrix + D * G, D, DP, G, GP)
        else:
            products += _products(first_token(base, block, x_t, x_d, BLOCK, D, DP), matrix, D, DP, G, GP)
    target = out + (flat.to(tl.int64) * blocks + block) * (G + 2 * WAVES)
    tl.store(target + to, tl.sum(products, 0), mask=to < G)
    wave = tl.arange(0, WP)
    some = wave < WAVES
    cos = tl.load(waves + block * 2 * WAVES + wave, mask=some)
    sin = tl.load(waves + block * 2 * WAVES + WAVES + wave, mask=some)
    if KEYS:
        a = tl.load(slopes + group * 2 * WAVES + wave, mask=some)
        c = tl.load(slopes + group * 2 * WAVES + WAVES + wave, mask=some)
        tl.store(target + G + wave, a * cos - c * sin, mask=some)
        tl.store(target + G + WAVES + wave, a * sin + c * cos, mask=some)
    else:
        tl.store(target + G + wave, cos, mask=some)
        tl.store(target + G + WAVES + wave, sin, mask=some)
