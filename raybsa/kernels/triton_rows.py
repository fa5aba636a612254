"""What a ring does with whole rows on a GPU, one launch each: merging the parts of two sets of keys, and delta.

In torch's operations each is a dozen passes over tensors of the output's size, as long as a tenth of the attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from raybsa.kernels.triton_arguments import strides
from raybsa.kernels.triton_launch import launcher
from raybsa.kernels.triton_scores import load_tokens, store_tokens
from raybsa.kernels.triton_setup import launching_at
from raybsa.kernels.triton_tiles import padded_head_dim

ROWS = 32
_PLACES = WeakTensorKeyDictionary()  # of a hop's rows, whose rank has always as many tokens


def merged_rows(
    whole: Tensor, whole_lse: Tensor, out: Tensor, lse: Tensor, rows: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As ``merge.merge_rows``, which says what its arguments are."""
    (batch, heads, tokens, head_dim), count = whole.shape, out.shape[2]
    result = whole if whole.dtype == dtype else torch.empty_like(whole, dtype=dtype)
    places = None if rows is None else _places(rows, tokens)
    whole_lse, lse = whole_lse.contiguous(), lse.contiguous()
    result_lse = torch.empty_like(whole_lse)
    tensors = (whole, whole_lse, out, lse, places, result, result_lse)
    every_constant = (ROWS, head_dim, padded_head_dim(head_dim), result is whole)
    with launching_at(whole):
        launch = launcher(merge_rows_kernel, tensors, strides(whole, out, result), every_constant)
        launch((triton.cdiv(tokens, ROWS), batch * heads), tensors, (heads, tokens, count))
    return result, result_lse


def fused_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """As ``delta.row_delta``, which says what its arguments are."""
    batch, heads, tokens, head_dim = out.shape
    delta = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    if not delta.numel():
        return delta
    tensors = (out, grad_out, grad_lse, delta)
    sizes = strides(out, grad_out) + ((0, 0, 0) if grad_lse is None else grad_lse.stride())
    every_constant = (ROWS, head_dim, padded_head_dim(head_dim))
    with launching_at(out):
        launch = launcher(row_delta_kernel, tensors, sizes, every_constant)
        launch((triton.cdiv(tokens, ROWS), batch * heads), tensors, (heads, tokens))
    return delta


def _places(rows: Tensor, tokens: int) -> Tensor:
    """(tokens,) int32: where each token is among ``rows``, -1 where it is not."""
    found = _PLACES.get(rows)
    if found is None:
        found = torch.full((tokens,), -1, dtype=torch.int32, device=rows.device)
        found[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        _PLACES[rows] = found
    return found


@triton.jit(do_not_specialize=["heads", "tokens", "count"])
def merge_rows_kernel(
    whole,
    whole_lse,
    part,
    part_lse,
    places,
    result,
    result_lse,
    whole_b,
    whole_h,
    whole_t,
    whole_d,
    part_b,
    part_h,
    part_t,
    part_d,
    result_b,
    result_h,
    result_t,
    result_d,
    heads,
    tokens,
    count,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Program (ROWS tokens, flat head): with those of a part that holds ``count``; others are copied, or stay."""
    flat_head = tl.program_id(1)
    b, h = (flat_head // heads).to(tl.int64), (flat_head % heads).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    place, there = token, inside
    if places is not None:
        place = tl.load(places + token, mask=inside, other=-1)
        there = place >= 0
    at = flat_head.to(tl.int64) * tokens + token
    lse_a = tl.load(whole_lse + at, mask=inside, other=float("-inf"))
    lse_b = tl.load(part_lse + flat_head.to(tl.int64) * count + place, mask=there, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(lse_a - base), tl.exp(lse_b - base)
    total = weight_a + weight_b
    safe = tl.where(total == 0.0, 1.0, total)
    dim = tl.arange(0, DP)
    base_a = whole + b * whole_b + h * whole_h + token.to(tl.int64)[:, None] * whole_t
    base_b = part + b * part_b + h * part_h + place.to(tl.int64)[:, None] * part_t
    changed = there if IN_PLACE else inside
    of_a = load_tokens(base_a + dim[None, :] * whole_d, changed, dim, False, D, DP).to(tl.float32)
    of_b = load_tokens(base_b + dim[None, :] * part_d, there, dim, False, D, DP).to(tl.float32)
    merged = of_a * (weight_a / safe)[:, None] + of_b * (weight_b / safe)[:, None]
    tl.store(result_lse + at, tl.where(total == 0.0, float("-inf"), base + tl.log(safe)), mask=inside)
    to = result + b * result_b + h * result_h + token.to(tl.int64)[:, None] * result_t
    store_tokens(to + dim[None, :] * result_d, merged, changed, dim, False, D, DP)


@triton.jit(do_not_specialize=["heads", "tokens"])
def row_delta_kernel(
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
    dlse_b,
    dlse_h,
    dlse_t,
    heads,
    tokens,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (ROWS tokens, flat head)."""
    flat_head = tl.program_id(1)
    b, h = (flat_head // heads).to(tl.int64), (flat_head % heads).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, steps = token < tokens, token.to(tl.int64)
    dim = tl.arange(0, DP)
    out_at = out + b * out_b + h * out_h + steps[:, None] * out_t + dim[None, :] * out_d
    do_at = grad_out + b * do_b + h * do_h + steps[:, None] * do_t + dim[None, :] * do_d
    outs = load_tokens(out_at, inside, dim, False, D, DP).to(tl.float32)
    sums = tl.sum(outs * load_tokens(do_at, inside, dim, False, D, DP).to(tl.float32), 1)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + b * dlse_b + h * dlse_h + steps * dlse_t, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + flat_head.to(tl.int64) * tokens + token, sums, mask=inside)
