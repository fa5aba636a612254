"""dK and dV: one program takes a tile of keys along (a part of) its column, the query blocks that see them.

Columns of the query heads that share a KV head are one list (``triton_plan.Columns``), so that GQA needs no sum
afterwards. Scores are made transposed, (keys, queries). The blocks that the diagonal cuts come first in a column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.gluon_grad_kv import GradKVWalk, grad_kv_form
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
from raybsa.kernels.triton_plan import MAX_BLOCKS, MEMBER_SHIFT, Columns, plan_columns
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

SHIFT, BLOCK_BITS = tl.constexpr(MEMBER_SHIFT), tl.constexpr(MAX_BLOCKS - 1)


class GradKV:
    """The launches of calls that differ in their numbers only, and where a layout is transient in
    its columns.

    A call gives k's and v's gradients (B, Hkv, Skv, D) in ``dtype``; delta (B, H, Sq) is contiguous.
    """

    def __init__(self, call: AttentionCall, grad_out: Tensor, dtype: torch.dtype) -> None:
        (batch, kv_heads, _, head_dim), layout = call.k.shape, call.layout
        sizes = (layout.kv_block_size, layout.q_block_size)
        self._tile = choose_tile("grad_kv", head_dim, call.q.dtype, *sizes, call.q.device)
        columns = plan_columns(call, self._tile.cols)
        copies, work = batch * kv_heads // columns.groups, columns.work
        self._grid = (work.sizes()[0] * max(1, layout.kv_block_size // self._tile.rows), copies)
        self._parts_shape = (work.parts * copies, layout.kv_block_size, head_dim)
        self._numbers = Numbers((columns.groups, layout.num_kv_blocks, work.parts), call)
        self._dtype = dtype
        self._launch: Launcher | None = None
        self._walk: GradKVWalk | None = None
        form = grad_kv_form(call, grad_out, dtype)
        if form and self._grid[0]:
            self._walk = GradKVWalk(call, columns, form, dtype)

    def __call__(self, call: AttentionCall, forward: Softmax, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        columns = plan_columns(call, self._tile.cols)
        work = columns.work
        grad_k, grad_v = empty_gradient(call.k, self._dtype), empty_gradient(call.v, self._dtype)
        if not self._grid[0]:
            return grad_k, grad_v
        parts_k = parts_v = None
        if work.parts:
            parts_k, parts_v = delta.new_empty(self._parts_shape), delta.new_empty(self._parts_shape)
        if self._walk:
            results = (grad_k, grad_v), (parts_k, parts_v)
            self._walk(call, forward.lse, delta, grad_out, *results, columns)
        else:
            self._tiled(call, forward, delta, grad_out, (grad_k, grad_v, parts_k, parts_v), columns)
        if parts_k is not None and parts_v is not None:
            sum_parts(parts_k, grad_k, work, columns.groups, call.layout.kv_block_size)
            sum_parts(parts_v, grad_v, work, columns.groups, call.layout.kv_block_size)
        return grad_k, grad_v

    def _tiled(
        self,
        call: AttentionCall,
        forward: Softmax,
        delta: Tensor,
        grad_out: Tensor,
        results: Tensors,
        columns: Columns,
    ) -> None:
        bias = (
            None
            if call.block_bias is None or columns.source is None
            else call.block_bias.index_select(0, columns.source)
        )
        tensors: Tensors = (forward.lse, call.q, call.k, call.v, grad_out, delta, *results)
        tensors = (*tensors, columns.work.items, columns.entries, *feature_tensors(call), bias)
        if self._launch is None:
            self._launch = self._launcher(call, grad_out, tensors)
        self._launch(self._grid, tensors, self._numbers(call))

    def _launcher(self, call: AttentionCall, grad_out: Tensor, tensors: Tensors) -> Launcher:
        tile, layout = self._tile, call.layout
        ours = {2: call.k, 3: call.v, 6: tensors[6], 7: tensors[7]}
        kept = boxes_of(tile, layout.kv_block_size, tile.rows, ours)
        walked = boxes_of(tile, layout.q_block_size, tile.cols, {1: call.q, 4: grad_out})
        sizes = feature_strides(call) + strides(call.q, call.k, call.v, grad_out, *tensors[6:8])
        every_constant = constants(call, tile, kept, walked)
        return launcher(grad_kv_kernel, tensors, sizes, every_constant, tile.warps, tile.stages, kept + walked)


@triton.jit(
    do_not_specialize=[
        "groups",
        "kv_blocks",
        "parts",
        "heads",
        "queries_per_kv",
        "q_tokens",
        "kv_tokens",
        "threshold",
    ]
)
def grad_kv_kernel(
    lse,
    q,
    k,
    v,
    grad_out,
    delta,
    grad_k,
    grad_v,
    part_k,
    part_v,
    items,
    entries,
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
    dk_b,
    dk_h,
    dk_t,
    dk_d,
    dv_b,
    dv_h,
    dv_t,
    dv_d,
    groups,
    kv_blocks,
    parts,
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
    """Program (item and tile within the KV block, copy of the group): ROWS keys."""
    TILES: tl.constexpr = KV_BLOCK // ROWS if KV_BLOCK > ROWS else 1
    K_EVEN: tl.constexpr = KV_BLOCK >= ROWS and not KV_RAGGED
    Q_EVEN: tl.constexpr = Q_BLOCK >= COLS and not Q_RAGGED
    if DROPOUT:
        hash_base = dropout_base(seed)
    item = items + (tl.program_id(0) // TILES) * 8
    column, begin, turn = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    end, part = tl.load(item + 3), tl.load(item + 4)
    kv_block = column % kv_blocks
    flat_kv_head = tl.program_id(1) * groups + column // kv_blocks
    kv_heads = heads // queries_per_kv
    b, kv_head = flat_kv_head // kv_heads, flat_kv_head % kv_heads
    dim = tl.arange(0, DP)

    in_block = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    k_token = kv_block * KV_BLOCK + in_block
    k_inside = (in_block < KV_BLOCK) & (k_token < kv_tokens)
    k_position = k_token
    if kv_starts is not None:
        k_position = tl.load(kv_starts + kv_block).to(tl.int32) + in_block
    k_steps = k_token.to(tl.int64)[:, None]
    corner = kv_block * KV_BLOCK + (tl.program_id(0) % TILES) * ROWS
    if KEPT_BOXES:
        keys = tl.reshape(k.load([b, kv_head, corner, 0]), [ROWS, DP])
        values = tl.reshape(v.load([b, kv_head, corner, 0]), [ROWS, DP])
    else:
        k_base = k + b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        v_base = v + b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
        keys = load_tokens(k_base + k_steps * k_t + dim[None, :] * k_d, k_inside, dim, K_EVEN, D, DP)
        values = load_tokens(v_base + k_steps * v_t + dim[None, :] * v_d, k_inside, dim, K_EVEN, D, DP)
    if not WALKED_BOXES:
        q_base, do_base = q + b.to(tl.int64) * q_b, grad_out + b.to(tl.int64) * do_b
    if q_ids is not None:
        k_segment = tl.load(kv_ids + b * kv_ids_b + k_token * kv_ids_t, mask=k_inside, other=0)

    sums_k = tl.zeros([ROWS, DP], tl.float32)
    sums_v = tl.zeros([ROWS, DP], tl.float32)
    lane = tl.arange(0, COLS) % Q_BLOCK if Q_BLOCK < COLS else tl.arange(0, COLS)
    cut = tl.cdiv((turn - begin) * Q_BLOCK, COLS)
    tiles = tl.cdiv((end - begin) * Q_BLOCK, COLS)
    for phase in tl.static_range(0 if CAUSAL else 1, 2):
        first = cut if phase and CAUSAL else 0
        last = tiles if phase else cut
        coming = load_blocks(entries, tile_slots(begin, first, Q_BLOCK, COLS), end, Q_BLOCK, COLS)
        for tile in tl.range(first, last):
            entry = coming
            slots = tile_slots(begin, tile, Q_BLOCK, COLS)
            coming = load_blocks(entries, tile_slots(begin, tile + 1, Q_BLOCK, COLS), end, Q_BLOCK, COLS)
            offset = tile_first(tile, Q_BLOCK, COLS)
            q_block = entry & BLOCK_BITS
            h = kv_head * queries_per_kv + (entry >> SHIFT)
            flat_head = b * heads + h
            q_token = q_block * Q_BLOCK + (offset + lane)
            q_inside = (q_token < q_tokens) & (slots < end)
            if WALKED_BOXES:
                queries = tl.reshape(q.load([b, h, q_block * Q_BLOCK + offset, 0]), [COLS, DP])
                grads = tl.reshape(grad_out.load([b, h, q_block * Q_BLOCK + offset, 0]), [COLS, DP])
            else:
                q_first, do_first = h.to(tl.int64) * q_h, h.to(tl.int64) * do_h
                q_at = tile_pointers(q_base, q_first, q_block, offset, lane, dim, q_t, q_d, Q_BLOCK, COLS)
                do_at = tile_pointers(do_base, do_first, q_block, offset, lane, dim, do_t, do_d, Q_BLOCK, COLS)
                queries = load_tokens(q_at, q_inside, dim, Q_EVEN, D, DP)
                grads = load_tokens(do_at, q_inside, dim, Q_EVEN, D, DP)
            grads = grads.to(queries.dtype)
            at_row = flat_head.to(tl.int64) * q_tokens + q_token
            if Q_EVEN:
                row_lse, row_delta = tl.load(lse + at_row), tl.load(delta + at_row)
            else:
                row_lse = tl.load(lse + at_row, mask=q_inside, other=float("inf"))
                row_delta = tl.load(delta + at_row, mask=q_inside, other=0.0)
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2E
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            q_position = q_token
            if q_starts is not None:
                q_position = tl.load(q_starts + q_block).to(tl.int32) + (offset + lane)
            if bias is not None:
                if Q_BLOCK >= COLS:
                    scores += tl.load(bias + slots).to(tl.float32) * LOG2E
                else:
                    scores += (tl.load(bias + slots, mask=slots < end, other=0.0).to(tl.float32) * LOG2E)[None, :]
            if mask is not None:
                at = b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + q_token.to(tl.int64) * mask_q
                pairs = k_inside[:, None] & q_inside[None, :]
                scores = add_mask(scores, mask + at[None, :] + k_token[:, None] * mask_k, pairs)
            if q_ids is not None:
                q_segment = tl.load(q_ids + b * q_ids_b + q_token * q_ids_t, mask=q_inside, other=0)
                scores = tl.where(k_segment[:, None] == q_segment[None, :], scores, float("-inf"))
            if phase == 0:
                scores = tl.where(k_position[:, None] <= q_position[None, :], scores, float("-inf"))
            weights = tl.math.exp2(scores - row_lse[None, :])
            of_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
            if DROPOUT:
                heads_of = flat_head if Q_BLOCK >= COLS else flat_head[None, :]
                kept = is_kept(hash_base, heads_of, q_position[None, :], k_position[:, None], threshold)
                factor = tl.where(kept, keep_factor, 0.0)
                of_weights *= factor
                sums_v = tl.dot((weights * factor).to(grads.dtype), grads, sums_v, input_precision=PRECISION)
            else:
                sums_v = tl.dot(weights.to(grads.dtype), grads, sums_v, input_precision=PRECISION)
            of_scores = weights * (of_weights - row_delta[None, :])
            sums_k = tl.dot(of_scores.to(queries.dtype), queries, sums_k, input_precision=PRECISION)

    sums_k = sums_k * (scale / LOG2E)
    if part_k is not None:
        if part >= 0:
            at = ((tl.program_id(1) * parts + part).to(tl.int64) * KV_BLOCK + in_block)[:, None] * D + dim[None, :]
            store_tokens(part_k + at, sums_k, in_block < KV_BLOCK, dim, False, D, DP)
            store_tokens(part_v + at, sums_v, in_block < KV_BLOCK, dim, False, D, DP)
    if part == -1:
        if KEPT_BOXES:
            grad_k.store([b, kv_head, corner, 0], tl.reshape(sums_k.to(grad_k.dtype), [1, 1, ROWS, DP]))
            grad_v.store([b, kv_head, corner, 0], tl.reshape(sums_v.to(grad_v.dtype), [1, 1, ROWS, DP]))
        else:
            dk_base = grad_k + b.to(tl.int64) * dk_b + kv_head.to(tl.int64) * dk_h
            dv_base = grad_v + b.to(tl.int64) * dv_b + kv_head.to(tl.int64) * dv_h
            store_tokens(dk_base + k_steps * dk_t + dim[None, :] * dk_d, sums_k, k_inside, dim, K_EVEN, D, DP)
            store_tokens(dv_base + k_steps * dv_t + dim[None, :] * dv_d, sums_v, k_inside, dim, K_EVEN, D, DP)
