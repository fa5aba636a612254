"""The sum of the parts of split lists, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_arguments import strides
from raybsa.kernels.triton_launch import launcher
from raybsa.kernels.triton_plan import Work
from raybsa.kernels.triton_scores import store_tokens
from raybsa.kernels.triton_tiles import padded_head_dim

SUM_ROWS = 16


def sum_parts(parts: Tensor, target: Tensor, work: Work, groups: int, block_size: int) -> None:
    """Writes the split lists' blocks of ``target`` (B, H', S, D): the sums of ``parts`` (copies * n, block, D) float32.

    ``groups`` different lists are shared by all heads in turn, as in the layout.
    """
    _, heads, tokens, head_dim = target.shape
    rows = min(SUM_ROWS, block_size)
    copies = target.shape[0] * heads // groups
    tensors, every_constant = (parts, target, work.splits), (block_size, rows, head_dim, padded_head_dim(head_dim))
    launch = launcher(sum_parts_kernel, tensors, strides(target), every_constant)
    grid = (work.sizes()[1] * (block_size // rows), copies)
    launch(grid, tensors, (groups, -(-tokens // block_size), work.parts, heads, tokens))


@triton.jit(do_not_specialize=["groups", "blocks", "parts", "heads", "tokens"])
def sum_parts_kernel(
    source,
    target,
    splits,
    target_b,
    target_h,
    target_t,
    target_d,
    groups,
    blocks,
    parts,
    heads,
    tokens,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (split list and ROWS of its block, copy of the group): the parts in ascending order."""
    TILES: tl.constexpr = BLOCK // ROWS
    split = splits + (tl.program_id(0) // TILES) * 4
    line, first, count = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    flat_head = tl.program_id(1) * groups + line // blocks
    in_block = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    token = (line % blocks) * BLOCK + in_block
    dim = tl.arange(0, DP)
    sums = tl.zeros([ROWS, DP], tl.float32)
    for part in tl.range(first, first + count):
        at = (tl.program_id(1) * parts + part).to(tl.int64) * BLOCK + in_block
        sums += tl.load(source + at[:, None] * D + dim[None, :], mask=(dim < D)[None, :], other=0.0)
    base = target + (flat_head // heads).to(tl.int64) * target_b + (flat_head % heads).to(tl.int64) * target_h
    pointers = base + token.to(tl.int64)[:, None] * target_t + dim[None, :] * target_d
    store_tokens(pointers, sums, (token < tokens) & (count > 0), dim, False, D, DP)
