"""The forward on Hopper, with warps that only load (``gluon_walk``): FlashAttention-3's schedule (2407.08608) in Gluon.

A group of warps starts the product of the next scores before the softmax of these, so that tensor cores and
exponentials overlap. The result equals ``triton_forward``'s up to rounding.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.gluon_rows import hide_keys, produce_rows, row_barriers
from raybsa.kernels.gluon_walk import GROUP_ROWS, Form, Walk, hear, is_plain
from raybsa.kernels.triton_arguments import Numbers, feature_tensors
from raybsa.kernels.triton_descriptors import Boxes
from raybsa.kernels.triton_launch import Tensors
from raybsa.kernels.triton_plan import Work


def forward_form(call: AttentionCall) -> Form | None:
    """How these kernels serve the call; None where they do not, or where the tiled kernel was measured to be faster."""
    layout, head_dim = call.layout, call.q.shape[-1]
    form = None
    if layout.q_block_size % 128 == 0 and layout.kv_block_size % 128 == 0 and head_dim in (64, 128):
        form = Form(2, 128, 2, 4 if head_dim == 64 else 2)
    elif layout.q_block_size == layout.kv_block_size == 64 and head_dim == 128:
        form = Form(1, 64, 2, 2)
    return form if form and is_plain(call) and _boxes(call, form, call.q) else None


class ForwardWalk:
    """The launch of ``forward_walk_kernel``."""

    def __init__(self, call: AttentionCall, work: Work, form: Form) -> None:
        layout, (batch, heads, _, head_dim) = call.layout, call.q.shape
        copies = batch * heads // layout.num_groups
        self._walk = Walk(forward_walk_kernel, form, work, layout.q_block_size, copies, call.q.device)
        sizes = (layout.num_groups, layout.num_q_blocks, work.parts)
        self._numbers = Numbers(sizes, call, (self._walk.works, self._walk.total))
        cuts = layout.causal or layout.kv_tokens % layout.kv_block_size != 0
        blocks = (layout.q_block_size, layout.kv_block_size)
        self._constants = (*blocks, form.cols, head_dim, form.kept, form.stages, form.groups, layout.causal, cuts)
        self._form = form

    def __call__(self, call: AttentionCall, tensors: Tensors) -> None:
        out, tensors = tensors[3], (*tensors, *feature_tensors(call)[:2])  # where the blocks lie in the sequence
        self._walk(tensors, self._numbers(call), self._constants, lambda: _boxes(call, self._form, out))


def _boxes(call: AttentionCall, form: Form, out: Tensor | None) -> Boxes:
    layout = call.layout
    kept, walked = {0: call.q, 3: out}, {1: call.k, 2: call.v}
    return form.boxes(layout.q_block_size, layout.kv_block_size, kept, walked)


@gluon.jit
def _consume(group: gl.constexpr, shared, barriers, lists, results, optional, form: gl.constexpr):
    """The online softmax of 64 queries over the tiles, and the store of what comes of it."""
    Q_BLOCK: gl.constexpr = form[0]
    KV_BLOCK: gl.constexpr = form[1]
    COLS: gl.constexpr = form[2]
    KEPT: gl.constexpr = form[3]
    STAGES: gl.constexpr = form[4]
    GROUPS: gl.constexpr = form[5]
    D: gl.constexpr = form[6]
    CUTS: gl.constexpr = form[7]
    CAUSAL: gl.constexpr = form[8]
    q_tiles, _do_tiles, k_tiles, v_tiles = shared
    q_full, k_full, v_full, q_empty, k_empty, v_empty, told = barriers
    col_indices, heads = lists
    out, lse, q_tokens, kv_tokens, scale = results
    part_out, part_lse, q_starts, kv_starts = optional
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_OUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    PER: gl.constexpr = KV_BLOCK // COLS
    used = 0  # tiles of K and V so far
    done = 0
    mbarrier.wait(q_full.index(0), 0)
    flat_head, q_block, in_block, begin, turn, end, part_row = hear(told, 0)
    while flat_head >= 0:
        whole, tiles = (turn - begin) * PER, (end - begin) * PER
        b, h = flat_head // heads, flat_head % heads
        slot = done % KEPT
        q_tile = q_tiles.index(GROUPS * slot + group)._reinterpret(q_tiles.dtype, [GROUP_ROWS, D], FLAT)
        row = in_block + group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, ROW)
        q_token = q_block * Q_BLOCK + row
        q_position = q_token
        if q_starts is not None:
            q_position = gl.load(q_starts + q_block).to(gl.int32) + row
        lse_at = lse + flat_head.to(gl.int64) * q_tokens + q_token
        acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
        top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, ROW)
        sums = gl.zeros([GROUP_ROWS], gl.float32, ROW)
        if tiles > 0:
            nothing = gl.zeros([GROUP_ROWS, COLS], gl.float32, S_LAYOUT)
            stage = used % STAGES
            keys = k_tiles.index(stage)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
            token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(k_empty.index(stage))
            if CUTS:
                s = hide_keys(
                    s, 0, whole, col_indices, kv_starts, begin, q_position, kv_tokens, KV_BLOCK, COLS, CAUSAL, S_LAYOUT
                )
            top = gl.max(s, 1) * scale
            base = gl.where(top == float("-inf"), 0.0, top)
            weights = gl.exp2(s * scale - base[:, None])
            sums = gl.sum(weights, 1)
            p = gl.convert_layout(weights.to(v_tiles.dtype), P_LAYOUT)
            for i in range(1, tiles):
                at = used + i
                stage = at % STAGES
                before = (at - 1) % STAGES
                keys = k_tiles.index(stage)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
                values = v_tiles.index(before)._reinterpret(v_tiles.dtype, [COLS, D], FLAT)
                mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
                s_token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
                o_token = warpgroup_mma(p, values, acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_token])
                if CUTS:
                    s = hide_keys(
                        s,
                        i,
                        whole,
                        col_indices,
                        kv_starts,
                        begin,
                        q_position,
                        kv_tokens,
                        KV_BLOCK,
                        COLS,
                        CAUSAL,
                        S_LAYOUT,
                    )
                new_top = gl.maximum(top, gl.max(s, 1) * scale)
                base = gl.where(new_top == float("-inf"), 0.0, new_top)
                weights = gl.exp2(s * scale - base[:, None])
                fade = gl.exp2(top - base)
                sums = sums * fade + gl.sum(weights, 1)
                top = new_top
                # Never true. It and the barrier of `arrive` hold the exponentials before the wait for the other
                # product, which ptxas would else move up.
                gl.store(lse_at, sums, mask=sums < 0.0)
                mbarrier.arrive(k_empty.index(stage))
                acc = warpgroup_mma_wait(0, deps=[o_token])
                mbarrier.arrive(v_empty.index(before))
                acc = acc * gl.convert_layout(fade, ROW_OUT)[:, None]
                p = gl.convert_layout(weights.to(v_tiles.dtype), P_LAYOUT)
            used += tiles
            last = (used - 1) % STAGES
            values = v_tiles.index(last)._reinterpret(v_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(v_full.index(last), ((used - 1) // STAGES) & 1)
            o_token = warpgroup_mma(p, values, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[o_token])
            mbarrier.arrive(v_empty.index(last))
        safe = gl.where(sums == 0.0, 1.0, sums)
        natural = (top + gl.log2(safe)) * 0.6931471805599453
        acc = acc / gl.convert_layout(safe, ROW_OUT)[:, None]
        if part_out is not None:
            if part_row >= 0:
                part_at = part_row.to(gl.int64) * Q_BLOCK + in_block + group * GROUP_ROWS
                gl.store(part_lse + part_at + gl.arange(0, GROUP_ROWS, ROW), natural)
                rows = part_at + gl.arange(0, GROUP_ROWS, ROW_OUT)
                dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                gl.store(part_out + rows[:, None] * D + dim[None, :], acc)
        if part_row < 0:
            gl.store(lse_at, natural, mask=q_token < q_tokens)
            q_tile.store(acc.to(q_tiles.dtype))
            fence_async_shared()
            first = q_block * Q_BLOCK + in_block + group * GROUP_ROWS
            tma.async_copy_shared_to_global(out, [b, h, first, 0], q_tiles.index(GROUPS * slot + group))
            tma.store_wait(0)
        mbarrier.arrive(q_empty.index(slot))
        done += 1
        mbarrier.wait(q_full.index(done % KEPT), (done // KEPT) & 1)
        flat_head, q_block, in_block, begin, turn, end, part_row = hear(told, done % KEPT)


@gluon.jit(
    do_not_specialize=[
        "groups",
        "q_blocks",
        "parts",
        "heads",
        "queries_per_kv",
        "q_tokens",
        "kv_tokens",
        "item_count",
        "total",
    ]
)
def forward_walk_kernel(
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
    dealt,
    groups,
    q_blocks,
    parts,
    heads,
    queries_per_kv,
    q_tokens,
    kv_tokens,
    scale,
    item_count,
    total,
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    D: gl.constexpr,
    KEPT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr,
    CUTS: gl.constexpr,
):
    """A program takes works (item, 64 queries a group of warps, copy of the layout's group) until none is left."""
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS * KEPT, 1, 1, GROUP_ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, COLS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, COLS, D], v.layout)
    shared = (q_tiles, None, k_tiles, v_tiles)
    barriers = row_barriers(KEPT, STAGES, GROUPS)
    plan = (items, col_indices, total, groups, q_blocks, parts, item_count, heads)
    lists = (col_indices, heads)
    results = (out, lse, q_tokens, kv_tokens, scale)
    optional = (part_out, part_lse, q_starts, kv_starts)
    form: gl.constexpr = (Q_BLOCK, KV_BLOCK, COLS, KEPT, STAGES, GROUPS, D, CUTS, CAUSAL)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, shared, barriers, lists, results, optional, form)),
                (_consume, (1, shared, barriers, lists, results, optional, form)),
                (produce_rows, (q, k, v, None, None, queries_per_kv, dealt, shared, barriers, plan, form)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, shared, barriers, lists, results, optional, form)),
                (produce_rows, (q, k, v, None, None, queries_per_kv, dealt, shared, barriers, plan, form)),
            ],
            [1],
            [24],
        )
