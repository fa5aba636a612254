"""dQ and block_bias's gradient: one program takes a tile of queries along (a part of) its row of kept blocks.

It has the rows of out and of its gradient at hand, and so makes delta on the way, for itself and for dK/dV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.gluon_grad_q import GradQWalk, grad_q_form
from raybsa.kernels.triton_arguments import (
    Numbers,
    Softmax,
    constants,
    empty_gradient,
    feature_strides,
    feature_tensors,
    strides,
)
from raybsa.kernels.triton_descriptors import boxes_of
from raybsa.kernels.triton_launch import Launcher, Tensors, launcher
from raybsa.kernels.triton_plan import plan_rows
from raybsa.kernels.triton_reduce import sum_parts
from raybsa.kernels.triton_scores import (
    LOG2E,
    add_mask,
    dropout_base,
    is_kept,
    load_blocks,
    load_tokens,
    store_tokens,
    tile_first,
    tile_pointers,
    tile_slots,
)
from raybsa.kernels.triton_tiles import choose_tile


class GradQ:
    """The launches of calls that differ in their numbers only.

    A call gives q's gradient (B, H, Sq, D) in ``dtype``, and block_bias's (nnz,) if wanted. ``delta`` (B, H, Sq) is
    read, or written first where ``forward`` has the output that it is made of.
    """

    def __init__(
        self, call: AttentionCall, forward: Softmax, grad_out: Tensor, with_bias: bool, dtype: torch.dtype
    ) -> None:
        (batch, heads, _, head_dim), layout = call.q.shape, call.layout
        sizes = (layout.q_block_size, layout.kv_block_size)
        self._tile = choose_tile("grad_q", head_dim, call.q.dtype, *sizes, call.q.device)
        self._work, self._copies = plan_rows(call, self._tile.cols), batch * heads // layout.num_groups
        per_block = max(1, layout.q_block_size // self._tile.rows)
        per_key_block = max(1, layout.kv_block_size // self._tile.cols)
        self._grid = (self._work.sizes()[0] * per_block, self._copies)
        self._bias_shape = (self._copies * per_block, layout.nnz_blocks, per_key_block) if with_bias else None
        self._parts_shape = (self._work.parts * self._copies, layout.q_block_size, head_dim)
        counts = (layout.num_groups, layout.num_q_blocks, self._work.parts, layout.nnz_blocks)
        self._numbers = Numbers(counts, call)
        self._dtype = dtype
        self._launch: Launcher | None = None
        self._walk: GradQWalk | None = None
        form = grad_q_form(call, forward, grad_out, dtype)
        if form and self._grid[0]:
            self._walk = GradQWalk(call, forward, self._work, form)

    def __call__(
        self, call: AttentionCall, forward: Softmax, delta: Tensor, grad_out: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        layout, work = call.layout, self._work
        grad = empty_gradient(call.q, self._dtype)
        bias_sums = None if self._bias_shape is None else delta.new_empty(self._bias_shape)
        parts = delta.new_empty(self._parts_shape) if work.parts else None
        if self._walk:
            self._walk(call, forward, delta, grad_out, grad, parts, work)
        elif self._grid[0]:
            tensors: Tensors = (call.q, call.k, call.v, grad_out, forward.out, forward.grad_lse, forward.lse)
            tensors = (*tensors, delta, grad, parts, bias_sums, work.items, layout.col_indices)
            tensors = (*tensors, *feature_tensors(call), call.block_bias)
            if self._launch is None:
                self._launch = self._launcher(call, tensors)
            self._launch(self._grid, tensors, self._numbers(call))
        if parts is not None:
            sum_parts(parts, grad, work, layout.num_groups, layout.q_block_size)
        if bias_sums is None or call.block_bias is None:
            return grad, None
        return grad, bias_sums.sum((0, 2)).to(call.block_bias.dtype)

    def _launcher(self, call: AttentionCall, tensors: Tensors) -> Launcher:
        tile, layout = self._tile, call.layout
        _, _, _, grad_out, out, grad_lse, _, _, grad, *_ = tensors
        same_type = grad_out is not None and grad_out.dtype == call.q.dtype
        ours = {0: call.q, 3: grad_out, 4: out, 8: grad} if same_type else {}
        kept = boxes_of(tile, layout.q_block_size, tile.rows, ours)
        walked = boxes_of(tile, layout.kv_block_size, tile.cols, {1: call.k, 2: call.v})
        sizes = feature_strides(call) + strides(call.q, call.k, call.v, grad_out, grad, out)
        sizes += (0, 0, 0) if grad_lse is None else grad_lse.stride()
        every_constant = constants(call, tile, kept, walked)
        return launcher(grad_q_kernel, tensors, sizes, every_constant, tile.warps, tile.stages, kept + walked)


@triton.jit(
    do_not_specialize=[
        "groups",
        "q_blocks",
        "parts",
        "nnz_blocks",
        "heads",
        "queries_per_kv",
        "q_tokens",
        "kv_tokens",
        "threshold",
    ]
)
def grad_q_kernel(
    q,
    k,
    v,
    grad_out,
    out,
    grad_lse,
    lse,
    delta,
    grad,
    part_grad,
    bias_sums,
    items,
    col_indices,
    q_starts,
    kv_starts,
    mask,
    q_ids,
    kv_ids,
    seed,
    bias,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    q_ids_b,
    q_ids_t,
    kv_ids_b,
    kv_ids_t,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    v_b,
    v_h,
    v_t,
    v_d,
    do_b,
    do_h,
    do_t,
    do_d,
    grad_b,
    grad_h,
    grad_t,
    grad_d,
    out_b,
    out_h,
    out_t,
    out_d,
    dlse_b,
    dlse_h,
    dlse_t,
    groups,
    q_blocks,
    parts,
    nnz_blocks,
    heads,
    queries_per_kv,
    q_tokens,
    kv_tokens,
    scale,
    threshold,
    keep_factor,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    Q_RAGGED: tl.constexpr,
    KV_RAGGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT_BOXES: tl.constexpr,
    WALKED_BOXES: tl.constexpr,
):
    """Program (item and tile within the query block, copy of the group): ROWS queries."""
    TILES: tl.constexpr = Q_BLOCK // ROWS if Q_BLOCK > ROWS else 1
    Q_EVEN: tl.constexpr = Q_BLOCK >= ROWS and not Q_RAGGED
    CUTS: tl.constexpr = CAUSAL or KV_RAGGED or KV_BLOCK < COLS
    if DROPOUT:
        hash_base = dropout_base(seed)
    item = items + (tl.program_id(0) // TILES) * 8
    row, begin, turn = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    end, part = tl.load(item + 3), tl.load(item + 4)
    q_block = row % q_blocks
    flat_head = tl.program_id(1) * groups + row // q_blocks
    b, h = flat_head // heads, flat_head % heads
    dim = tl.arange(0, DP)

    in_block = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    q_token = q_block * Q_BLOCK + in_block
    q_inside = (in_block < Q_BLOCK) & (q_token < q_tokens)
    q_position = q_token
    if q_starts is not None:
        q_position = tl.load(q_starts + q_block).to(tl.int32) + in_block
    q_steps = q_token.to(tl.int64)[:, None]
    corner = q_block * Q_BLOCK + (tl.program_id(0) % TILES) * ROWS
    if KEPT_BOXES:
        queries = tl.reshape(q.load([b, h, corner, 0]), [ROWS, DP])
        grads = tl.reshape(grad_out.load([b, h, corner, 0]), [ROWS, DP])
    else:
        q_base = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        queries = load_tokens(q_base + q_steps * q_t + dim[None, :] * q_d, q_inside, dim, Q_EVEN, D, DP)
        do_base = grad_out + b.to(tl.int64) * do_b + h.to(tl.int64) * do_h
        grads = load_tokens(do_base + q_steps * do_t + dim[None, :] * do_d, q_inside, dim, Q_EVEN, D, DP)
        grads = grads.to(queries.dtype)
    at_row = flat_head.to(tl.int64) * q_tokens + q_token
    row_lse = tl.load(lse + at_row, mask=q_inside, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2E
    if out is None:
        row_delta = tl.load(delta + at_row, mask=q_inside, other=0.0)
    else:
        if KEPT_BOXES:
            outs = tl.reshape(out.load([b, h, corner, 0]), [ROWS, DP])
        else:
            out_base = out + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h
            outs = load_tokens(out_base + q_steps * out_t + dim[None, :] * out_d, q_inside, dim, Q_EVEN, D, DP)
        row_delta = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
        if grad_lse is not None:
            at_lse = b.to(tl.int64) * dlse_b + h.to(tl.int64) * dlse_h + q_token.to(tl.int64) * dlse_t
            row_delta -= tl.load(grad_lse + at_lse, mask=q_inside, other=0.0).to(tl.float32)
        tl.store(delta + at_row, row_delta, mask=q_inside)
    kv_head = h // queries_per_kv
    if not WALKED_BOXES:
        k_base = k + b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        v_base = v + b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    if q_ids is not None:
        q_segment = tl.load(q_ids + b * q_ids_b + q_token * q_ids_t, mask=q_inside, other=0)

    sums = tl.zeros([ROWS, DP], tl.float32)
    lane = tl.arange(0, COLS) % KV_BLOCK if KV_BLOCK < COLS else tl.arange(0, COLS)
    whole = (turn - begin) * KV_BLOCK // COLS
    tiles = tl.cdiv((end - begin) * KV_BLOCK, COLS)
    for phase in tl.static_range(2 if CUTS else 1):
        first = whole if phase else 0
        last = tiles if phase else whole
        coming = load_blocks(col_indices, tile_slots(begin, first, KV_BLOCK, COLS), end, KV_BLOCK, COLS)
        for tile in tl.range(first, last):
            kv_block = coming
            slots = tile_slots(begin, tile, KV_BLOCK, COLS)
            coming = load_blocks(col_indices, tile_slots(begin, tile + 1, KV_BLOCK, COLS), end, KV_BLOCK, COLS)
            offset = tile_first(tile, KV_BLOCK, COLS)
            k_token = kv_block * KV_BLOCK + (offset + lane)
            k_inside = (k_token < kv_tokens) & (slots < end)
            if WALKED_BOXES:
                keys = tl.reshape(k.load([b, kv_head, kv_block * KV_BLOCK + offset, 0]), [COLS, DP])
            else:
                k_at = tile_pointers(k_base, 0, kv_block, offset, lane, dim, k_t, k_d, KV_BLOCK, COLS)
                keys = load_tokens(k_at, k_inside, dim, phase == 0, D, DP)
            if WALKED_BOXES:
                values = tl.reshape(v.load([b, kv_head, kv_block * KV_BLOCK + offset, 0]), [COLS, DP])
            else:
                v_at = tile_pointers(v_base, 0, kv_block, offset, lane, dim, v_t, v_d, KV_BLOCK, COLS)
                values = load_tokens(v_at, k_inside, dim, phase == 0, D, DP)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            k_position = k_token
            if kv_starts is not None:
                k_position = tl.load(kv_starts + kv_block).to(tl.int32) + (offset + lane)
            if bias is not None:
                if KV_BLOCK >= COLS:
                    scores += tl.load(bias + slots).to(tl.float32) * LOG2E
                else:
                    scores += (tl.load(bias + slots, mask=slots < end, other=0.0).to(tl.float32) * LOG2E)[None, :]
            if mask is not None:
                at = b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + q_token.to(tl.int64)[:, None] * mask_q
                pairs = q_inside[:, None] & k_inside[None, :]
                scores = add_mask(scores, mask + at + k_token[None, :] * mask_k, pairs)
            if q_ids is not None:
                k_segment = tl.load(kv_ids + b * kv_ids_b + k_token * kv_ids_t, mask=k_inside, other=0)
                scores = tl.where(q_segment[:, None] == k_segment[None, :], scores, float("-inf"))
            if phase == 1:
                scores = tl.where(k_inside[None, :], scores, float("-inf"))
                if CAUSAL:
                    scores = tl.where(k_position[None, :] <= q_position[:, None], scores, float("-inf"))
            weights = tl.math.exp2(scores - row_lse[:, None])
            of_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            if DROPOUT:
                kept = is_kept(hash_base, flat_head, q_position[:, None], k_position[None, :], threshold)
                of_weights = tl.where(kept, of_weights * keep_factor, 0.0)
            of_scores = weights * (of_weights - row_delta[:, None])
            if bias_sums is not None:
                line = bias_sums + (tl.program_id(1) * TILES + tl.program_id(0) % TILES).to(tl.int64) * nnz_blocks * (
                    KV_BLOCK // COLS if KV_BLOCK > COLS else 1
                )
                by_key = tl.sum(of_scores, 0)
                if KV_BLOCK >= COLS:
                    tl.store(line + begin.to(tl.int64) * (KV_BLOCK // COLS) + tile, tl.sum(by_key, 0))
                else:
                    BLOCKS: tl.constexpr = COLS // KV_BLOCK
                    places = begin + tile * BLOCKS + tl.arange(0, BLOCKS)
                    by_block = tl.sum(tl.reshape(by_key, [BLOCKS, KV_BLOCK]), 1)
                    tl.store(line + places, by_block, mask=places < end)
            sums = tl.dot(of_scores.to(keys.dtype), keys, sums, input_precision=PRECISION)

    sums = sums * (scale / LOG2E)
    if part_grad is not None:
        if part >= 0:
            at = (tl.program_id(1) * parts + part).to(tl.int64) * Q_BLOCK + in_block
            store_tokens(part_grad + at[:, None] * D + dim[None, :], sums, in_block < Q_BLOCK, dim, False, D, DP)
    if part < 0:
        if KEPT_BOXES:
            grad.store([b, h, corner, 0], tl.reshape(sums.to(grad.dtype), [1, 1, ROWS, DP]))
        else:
            grad_base = grad + b.to(tl.int64) * grad_b + h.to(tl.int64) * grad_h
            store_tokens(grad_base + q_steps * grad_t + dim[None, :] * grad_d, sums, q_inside, dim, Q_EVEN, D, DP)
