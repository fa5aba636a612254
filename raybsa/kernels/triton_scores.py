"""What the Triton kernels share: finding a tile's tokens, hiding pairs of tokens, drawing dropout.

Scores are in base 2 (``log2(e) * (scale * q.k + bias)``), so that weights are ``exp2``. Queries and keys come with
their axis: (M, 1) and (1, N) where queries are rows, (1, M) and (N, 1) where keys are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from raybsa.counter import Stream

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-30000.0)
ABSORBING = tl.constexpr(-1e8)  # float32 holds no score beside it
DROPOUT_STREAM = tl.constexpr(int(Stream.DROPOUT))


@triton.jit
def tile_slots(begin, tile, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Places in the list of blocks of size SIZE: one number where a block holds the whole tile, else (TILE,)."""
    if SIZE >= TILE:
        return begin + tile // (SIZE // TILE)
    else:
        return begin + tile * (TILE // SIZE) + tl.arange(0, TILE) // SIZE


@triton.jit
def tile_first(tile, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where in its block the tile begins: not 0 only where a block holds several tiles."""
    if SIZE > TILE:
        return (tile % (SIZE // TILE)) * TILE
    else:
        return 0


@triton.jit
def tile_pointers(base, offset, blocks, first, lane, dim, step, dim_step, SIZE: tl.constexpr, TILE: tl.constexpr):
    """(TILE, DP) pointers to the tokens ``first + lane`` of ``blocks``, beyond ``base + offset``.

    What changes from tile to tile is one number where a block holds the tile, one a token where blocks are gathered.
    """
    corner = offset + (blocks * SIZE + first).to(tl.int64) * step
    spread = lane[:, None] * step + dim[None, :] * dim_step
    if SIZE >= TILE:
        return base + corner + spread
    else:
        return base + corner[:, None] + spread


@triton.jit
def load_blocks(blocks, slots, end, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The entries at ``slots``, 0 from ``end`` on."""
    return tl.load(blocks + slots, mask=slots < end, other=0)


@triton.jit
def load_tokens(pointers, inside, dim, EVEN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """(tokens, DP) numbers, 0 outside; EVEN says that all tokens are inside."""
    if EVEN:
        if D == DP:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)
    else:
        if D == DP:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def store_tokens(pointers, values, inside, dim, EVEN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Stores (tokens, DP) numbers where inside."""
    values = values.to(pointers.dtype.element_ty)
    if EVEN:
        if D == DP:
            tl.store(pointers, values)
        else:
            tl.store(pointers, values, mask=(dim < D)[None, :])
    else:
        tl.store(pointers, values, mask=inside[:, None] & (dim < D)[None, :])


@triton.jit
def add_mask(scores, pointers, inside):
    """Scores with attn_mask applied: uint8 (nonzero = attend) or floating point (added).

    A finite number below LEAST counts as LEAST, whose weight is 0 beside any visible key, and below ABSORBING without
    the score. Where all keys of a row are hidden so, a lse as large as ``finfo.min`` could not hold the logarithm of
    how many they are.
    """
    if pointers.dtype.element_ty == tl.uint8:
        return tl.where(tl.load(pointers, mask=inside, other=0) != 0, scores, float("-inf"))
    else:
        added = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        hidden = (added < LEAST) & (added > float("-inf"))
        kept = tl.where(hidden & (added < ABSORBING), 0.0, scores)
        return kept + tl.where(hidden, LEAST, added) * LOG2E


@triton.jit
def mix(x):
    """lowbias32 of uint32 numbers, as raybsa.counter has it."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_base(seed):
    """The state of raybsa.counter's hash after the seed, () int64 in memory, and the stream of dropout."""
    return mix(mix(tl.load(seed).to(tl.uint32)) ^ DROPOUT_STREAM)


@triton.jit
def is_kept(base, head, q_position, k_position, threshold):
    """Whether dropout keeps each weight: raybsa.counter's number of (head, row, column), against the threshold."""
    state = mix(base ^ head.to(tl.uint32))
    state = mix(mix(state ^ q_position.to(tl.uint32)) ^ k_position.to(tl.uint32))
    return (state >> 8).to(tl.int32) >= threshold
