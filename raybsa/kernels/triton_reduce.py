"""The small kernels around the backward: delta, and the sum of the parts of split lists in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.triton_arguments import strides
from raybsa.kernels.triton_launch import launch
from raybsa.kernels.triton_plan import Work
from raybsa.kernels.triton_scores import load_tokens, store_tokens
from raybsa.kernels.triton_tiles import padded_head_dim

DELTA_ROWS, SUM_ROWS = 64, 16


def delta_of(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """(B, H, Sq) float32: ``rowsum(out * grad_out) - grad_lse``, what softmax's gradient takes off every weight's."""
    batch, heads, tokens, head_dim = out.shape
    delta = torch.empty(batch, heads, tokens, dtype=torch.float32, device=out.device)
    if not tokens:
        return delta
    launch(
        delta_kernel,
        (triton.cdiv(tokens, DELTA_ROWS), batch * heads),
        (out, grad_out, grad_lse, delta),
        strides(out, grad_out) + ((0, 0, 0) if grad_lse is None else grad_lse.stride()),
        (heads, tokens),
        (DELTA_ROWS, head_dim, padded_head_dim(head_dim)),
    )
    return delta


def sum_parts(parts: Tensor, target: Tensor, work: Work, groups: int, block_size: int) -> None:
    """Writes the split lists' blocks of ``target`` (B, H', S, D): the sums of ``parts`` (copies * n, block, D) float32.

    ``groups`` different lists are shared by all heads in turn, as in the layout.
    """
    _, heads, tokens, head_dim = target.shape
    rows = min(SUM_ROWS, block_size)
    copies = target.shape[0] * heads // groups
    launch(
        sum_parts_kernel,
        (work.sizes()[1] * (block_size // rows), copies),
        (parts, target, work.splits),
        strides(target),
        (groups, -(-tokens // block_size), work.parts, heads, tokens),
        (block_size, rows, head_dim, padded_head_dim(head_dim)),
    )


@triton.jit(do_not_specialize=["heads", "tokens"])
def delta_kernel(
    out,
    grad_out,
    grad_lse,
    delta,
    out_b,
    out_h,
    out_t,
    out_d,
    do_b,
    do_h,
    do_t,
    do_d,
    lse_b,
    lse_h,
    lse_t,
    heads,
    tokens,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (ROWS tokens, flat head)."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    dim, inside, steps = tl.arange(0, DP), token < tokens, token.to(tl.int64)
    out_pointers = out + b * out_b + h * out_h + steps[:, None] * out_t + dim[None, :] * out_d
    do_pointers = grad_out + b * do_b + h * do_h + steps[:, None] * do_t + dim[None, :] * do_d
    values = load_tokens(out_pointers, inside, dim, False, D, DP).to(tl.float32)
    grads = load_tokens(do_pointers, inside, dim, False, D, DP).to(tl.float32)
    result = tl.sum(values * grads, 1)
    if grad_lse is not None:
        of_lse = tl.load(grad_lse + b * lse_b + h * lse_h + steps * lse_t, mask=inside, other=0.0)
        result -= of_lse.to(tl.float32)
    tl.store(delta + tl.program_id(1).to(tl.int64) * tokens + token, result, mask=inside)


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
    store_tokens(pointers, sums, token < tokens, dim, False, D, DP)
