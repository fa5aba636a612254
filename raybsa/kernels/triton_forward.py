"""The forward kernel: one program takes a tile of queries along (a part of) its row of kept blocks.

The online softmax of FlashAttention (2205.14135): whole tiles first, without any mask; then the tiles at the end of the
row that the diagonal, the ragged end or the end of the list cuts. Parts of split rows are merged by their lse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.gluon_forward import ForwardWalk, forward_form
from raybsa.kernels.kept import kept_with_rows
from raybsa.kernels.triton_arguments import (
    Numbers,
    constants,
    dot_precision,
    feature_strides,
    feature_tensors,
    strides,
)
from raybsa.kernels.triton_descriptors import boxes_of
from raybsa.kernels.triton_launch import Launcher, Tensors, launcher
from raybsa.kernels.triton_plan import Work, plan_rows
from raybsa.kernels.triton_scores import (
    LN2,
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
from raybsa.kernels.triton_tiles import Tile, choose_tile, padded_head_dim

MERGE_ROWS = 16


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) float32."""
    kept, alignment = kept_with_rows(call.layout), call.layout.col_indices.data_ptr() % 16
    key = ("forward", dot_precision(call.q.dtype), call.signature, alignment)
    if key not in kept:
        kept[key] = _Forward(call)
    return kept[key](call)


class _Forward:
    """The launches of calls that differ in their numbers only."""

    def __init__(self, call: AttentionCall) -> None:
        (batch, heads, _, head_dim), layout = call.q.shape, call.layout
        sizes = (layout.q_block_size, layout.kv_block_size)
        tile = choose_tile("forward", head_dim, call.q.dtype, *sizes, call.q.device)
        self._work, self._copies = plan_rows(call, tile.cols), batch * heads // layout.num_groups
        items, splits = self._work.sizes()
        rows = min(MERGE_ROWS, layout.q_block_size)
        self._merge_grid = (splits * (layout.q_block_size // rows), self._copies)
        self._empty, form = not items, forward_form(call)
        self._walk = ForwardWalk(call, self._work, form) if form else _Walk(call, self._work, tile)
        self._merge: Launcher | None = None

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        layout, work = call.layout, self._work
        out = torch.empty_like(call.q)
        lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
        if self._empty:
            return out, lse
        part_out = part_lse = None
        if self._merge_grid[0]:
            part_out = lse.new_empty(work.parts * self._copies, layout.q_block_size, call.q.shape[-1])
            part_lse = lse.new_empty(work.parts * self._copies, layout.q_block_size)
        self._walk(call, (call.q, call.k, call.v, out, lse, part_out, part_lse, work.items, layout.col_indices))
        if part_out is not None:
            self._merge_parts(call, (part_out, part_lse, out, lse, work.splits))
        return out, lse

    def _merge_parts(self, call: AttentionCall, tensors: Tensors) -> None:
        """Writes the split rows of out and lse."""
        (_, heads, tokens, head_dim), layout = call.q.shape, call.layout
        if self._merge is None:
            rows = min(MERGE_ROWS, layout.q_block_size)
            every_constant = (layout.q_block_size, rows, head_dim, padded_head_dim(head_dim))
            self._merge = launcher(merge_parts_kernel, tensors, strides(tensors[2]), every_constant)
        self._merge(
            self._merge_grid, tensors, (layout.num_groups, layout.num_q_blocks, self._work.parts, heads, tokens)
        )


class _Walk:
    """The launch of ``forward_kernel``."""

    def __init__(self, call: AttentionCall, work: Work, tile: Tile) -> None:
        layout, (batch, heads) = call.layout, call.q.shape[:2]
        self._tile, items = tile, work.items.shape[0]
        self._grid = (items * max(1, layout.q_block_size // tile.rows), batch * heads // layout.num_groups)
        self._numbers = Numbers((layout.num_groups, layout.num_q_blocks, work.parts), call)
        self._launch: Launcher | None = None

    def __call__(self, call: AttentionCall, tensors: Tensors) -> None:
        tensors = (*tensors, *feature_tensors(call), call.block_bias)
        if self._launch is None:
            self._launch = self._launcher(call, tensors)
        self._launch(self._grid, tensors, self._numbers(call))

    def _launcher(self, call: AttentionCall, tensors: Tensors) -> Launcher:
        tile, layout = self._tile, call.layout
        plain = call.attn_mask is None and call.segment_ids is None and call.block_bias is None and call.scale >= 0
        kept = boxes_of(tile, layout.q_block_size, tile.rows, {0: call.q, 3: tensors[3]})
        walked = boxes_of(tile, layout.kv_block_size, tile.cols, {1: call.k, 2: call.v})
        sizes = feature_strides(call) + strides(call.q, call.k, call.v, tensors[3])
        every_constant = (*constants(call, tile, kept, walked), plain)
        return launcher(forward_kernel, tensors, sizes, every_constant, tile.warps, tile.stages, kept + walked)


@triton.jit(
    do_not_specialize=[
        "groups",
        "q_blocks",
        "parts",
        "heads",
        "queries_per_kv",
        "q_tokens",
        "kv_tokens",
        "threshold",
    ]
)
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    part_out,
    part_lse,
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
    out_b,
    out_h,
    out_t,
    out_d,
    groups,
    q_blocks,
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
    PLAIN: tl.constexpr,
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
    corner = q_block * Q_BLOCK + (tl.program_id(0) % TILES) * ROWS
    if KEPT_BOXES:
        queries = tl.reshape(q.load([b, h, corner, 0]), [ROWS, DP])
    else:
        q_at = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + q_token.to(tl.int64)[:, None] * q_t
        queries = load_tokens(q_at + dim[None, :] * q_d, q_inside, dim, Q_EVEN, D, DP)
    kv_head = h // queries_per_kv
    if not WALKED_BOXES:
        k_base = k + b.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        v_base = v + b.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    if q_ids is not None:
        q_segment = tl.load(q_ids + b * q_ids_b + q_token * q_ids_t, mask=q_inside, other=0)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
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
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            k_position = k_token
            if kv_starts is not None:
                k_position = tl.load(kv_starts + kv_block).to(tl.int32) + (offset + lane)
            if PLAIN and phase == 0:
                new_top = tl.maximum(top, tl.max(scores, 1) * scale)
                weights = tl.math.exp2(scores * scale - new_top[:, None])
                fade = tl.math.exp2(top - new_top)
            else:
                scores = scores * scale
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
                new_top = tl.maximum(top, tl.max(scores, 1))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                weights = tl.math.exp2(scores - base[:, None])
                fade = tl.math.exp2(top - base)
            total = total * fade + tl.sum(weights, 1)
            if DROPOUT:
                kept = is_kept(hash_base, flat_head, q_position[:, None], k_position[None, :], threshold)
                weights = tl.where(kept, weights, 0.0)
            if WALKED_BOXES:
                values = tl.reshape(v.load([b, kv_head, kv_block * KV_BLOCK + offset, 0]), [COLS, DP])
            else:
                v_at = tile_pointers(v_base, 0, kv_block, offset, lane, dim, v_t, v_d, KV_BLOCK, COLS)
                values = load_tokens(v_at, k_inside, dim, phase == 0, D, DP)
            sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
            top = new_top

    safe = tl.where(total == 0.0, 1.0, total)
    result = sums / safe[:, None]
    if DROPOUT:
        result *= keep_factor
    natural = (top + tl.math.log2(safe)) * LN2
    if part_out is not None:
        if part >= 0:
            at = (tl.program_id(1) * parts + part).to(tl.int64) * Q_BLOCK + in_block
            tl.store(part_lse + at, natural, mask=in_block < Q_BLOCK)
            store_tokens(part_out + at[:, None] * D + dim[None, :], result, in_block < Q_BLOCK, dim, False, D, DP)
    if part < 0:
        tl.store(lse + flat_head.to(tl.int64) * q_tokens + q_token, natural, mask=q_inside)
        if KEPT_BOXES:
            out.store([b, h, corner, 0], tl.reshape(result.to(out.dtype), [1, 1, ROWS, DP]))
        else:
            out_at = out + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h + q_token.to(tl.int64)[:, None] * out_t
            store_tokens(out_at + dim[None, :] * out_d, result, q_inside, dim, Q_EVEN, D, DP)


@triton.jit(do_not_specialize=["groups", "blocks", "parts", "heads", "tokens"])
def merge_parts_kernel(
    part_out,
    part_lse,
    out,
    lse,
    splits,
    out_b,
    out_h,
    out_t,
    out_d,
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
    """Program (split row and ROWS of its block, copy of the group): the parts in ascending order, as merge.py."""
    TILES: tl.constexpr = BLOCK // ROWS
    split = splits + (tl.program_id(0) // TILES) * 4
    row, first, count = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    flat_head = tl.program_id(1) * groups + row // blocks
    in_block = (tl.program_id(0) % TILES) * ROWS + tl.arange(0, ROWS)
    token = (row % blocks) * BLOCK + in_block
    inside = token < tokens
    dim = tl.arange(0, DP)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    for part in tl.range(first, first + count):
        at = (tl.program_id(1) * parts + part).to(tl.int64) * BLOCK + in_block
        part_top = tl.load(part_lse + at) * LOG2E
        new_top = tl.maximum(top, part_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.math.exp2(top - base), tl.math.exp2(part_top - base)
        values = tl.load(part_out + at[:, None] * D + dim[None, :], mask=(dim < D)[None, :], other=0.0)
        sums = sums * fade[:, None] + values * weight[:, None]
        total = total * fade + weight
        top = new_top
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + flat_head.to(tl.int64) * tokens + token, (top + tl.math.log2(safe)) * LN2, mask=inside)
    base = out + (flat_head // heads).to(tl.int64) * out_b + (flat_head % heads).to(tl.int64) * out_h
    pointers = base + token.to(tl.int64)[:, None] * out_t + dim[None, :] * out_d
    store_tokens(pointers, sums / safe[:, None], inside, dim, False, D, DP)
