"""dK and dV on Hopper, with warps that only load (``gluon_walk``).

Scores are made transposed, (keys, queries), 64 keys a group of warps, so that weights and their gradients are the left
sides of the products that follow and stay in registers. The scores of the next tile are under way before this tile's
last products have ended.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.gluon_walk import FACTS, GROUP_ROWS, LOG2E, Form, Walk, hear, is_plain, place, take, tell
from raybsa.kernels.triton_arguments import Numbers, feature_tensors
from raybsa.kernels.triton_descriptors import Boxes
from raybsa.kernels.triton_launch import Tensors
from raybsa.kernels.triton_plan import MAX_BLOCKS, MEMBER_SHIFT, Columns

SHIFT, BLOCK_BITS = gl.constexpr(MEMBER_SHIFT), gl.constexpr(MAX_BLOCKS - 1)
LANES = gl.constexpr(32)  # of the warp that loads


def grad_kv_form(call: AttentionCall, grad_out: Tensor, dtype: torch.dtype) -> Form | None:
    """How this kernel serves the call; None where it does not, or where the tiled kernel was measured to be faster."""
    layout, head_dim = call.layout, call.q.shape[-1]
    form = None
    if layout.kv_block_size % 128 == 0 and layout.q_block_size % 64 == 0 and head_dim in (64, 128):
        form = Form(2, 64, 2, 6 if head_dim == 64 else 3)
    elif layout.q_block_size == layout.kv_block_size == 64 and head_dim == 128:
        form = Form(1, 64, 1, 2)
    whole = layout.q_tokens % layout.q_block_size == 0  # a tile of lse and delta is read without a mask
    fits = grad_out.dtype == call.q.dtype and dtype in (call.q.dtype, torch.float32)
    return form if form and fits and whole and is_plain(call) and _boxes(call, form, grad_out) else None


class GradKVWalk:
    """The launch of ``grad_kv_walk_kernel``; the gradients of a part of a row's keys are float32, and contiguous."""

    def __init__(self, call: AttentionCall, columns: Columns, form: Form, dtype: torch.dtype) -> None:
        layout, (batch, kv_heads, _, head_dim) = call.layout, call.k.shape
        work, copies = columns.work, batch * kv_heads // columns.groups
        self._walk = Walk(grad_kv_walk_kernel, form, work, layout.kv_block_size, copies, call.q.device)
        sizes = (columns.groups, layout.num_kv_blocks, work.parts)
        self._numbers = Numbers(sizes, call, (self._walk.works, self._walk.total))
        blocks = (layout.q_block_size, layout.kv_block_size)
        self._part = dtype == torch.float32
        self._constants = (
            *blocks, form.cols, head_dim, form.kept, form.stages, form.groups, layout.causal, self._part
        )  # fmt: skip
        self._form = form

    def __call__(
        self,
        call: AttentionCall,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        grads: tuple[Tensor, Tensor],
        parts: tuple[Tensor | None, Tensor | None],
        columns: Columns,
    ) -> None:
        tensors: Tensors = (call.q, call.k, call.v, grad_out, *grads, lse, delta, *parts)
        tensors = (*tensors, columns.work.items, columns.entries, *feature_tensors(call)[:2])
        results = () if self._part else grads
        self._walk(tensors, self._numbers(call), self._constants, lambda: _boxes(call, self._form, grad_out, *results))


def _boxes(
    call: AttentionCall, form: Form, grad_out: Tensor, grad_k: Tensor | None = None, grad_v: Tensor | None = None
) -> Boxes:
    layout = call.layout
    kept, walked = {1: call.k, 2: call.v, 4: grad_k, 5: grad_v}, {0: call.q, 3: grad_out}
    return form.boxes(layout.kv_block_size, layout.q_block_size, kept, walked)


@gluon.jit
def _produce(q, k, v, grad_out, rows, queries_per_kv, dealt, shared, barriers, plan, form: gl.constexpr):
    """Loads keys and values, and in turn tiles with lse and delta, each when what lay there is done with."""
    Q_BLOCK: gl.constexpr = form[0]
    KV_BLOCK: gl.constexpr = form[1]
    COLS: gl.constexpr = form[2]
    KEPT: gl.constexpr = form[3]
    STAGES: gl.constexpr = form[4]
    GROUPS: gl.constexpr = form[5]
    lse, delta, q_tokens = rows
    k_tiles, v_tiles, q_tiles, do_tiles, lse_tiles, delta_tiles = shared
    k_full, q_full, do_full, k_empty, q_empty, do_empty, told = barriers
    items, entries, total, groups, kv_blocks, parts, item_count, kv_heads = plan
    LINE: gl.constexpr = gl.BlockedLayout([COLS // LANES], [LANES], [1], [0])
    PER: gl.constexpr = Q_BLOCK // COLS
    loaded = 0
    done = 0
    index = take(dealt, total)
    while index < total:
        flat_head, kv_block, in_block, begin, turn, end, part_row = place(
            items, index, total, groups, kv_blocks, parts, item_count, KV_BLOCK, GROUPS
        )
        b, kv_head = flat_head // kv_heads, flat_head % kv_heads
        slot = done % KEPT
        first = kv_block * KV_BLOCK + in_block
        mbarrier.wait(k_empty.index(slot), ((done // KEPT) & 1) ^ 1)
        tell(told, slot, flat_head, kv_block, in_block, begin, turn, end, part_row)
        mbarrier.expect(k_full.index(slot), 2 * GROUPS * k.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            at = [b, kv_head, first + group * GROUP_ROWS, 0]
            tma.async_copy_global_to_shared(k, at, k_full.index(slot), k_tiles.index(GROUPS * slot + group))
            tma.async_copy_global_to_shared(v, at, k_full.index(slot), v_tiles.index(GROUPS * slot + group))
        for i in range((end - begin) * PER):
            stage = loaded % STAGES
            phase = (loaded // STAGES) & 1
            entry = gl.load(entries + begin + i // PER)
            h = kv_head * queries_per_kv + (entry >> SHIFT)
            token = (entry & BLOCK_BITS) * Q_BLOCK + (i % PER) * COLS
            at_row = (b * kv_heads * queries_per_kv + h).to(gl.int64) * q_tokens + token + gl.arange(0, COLS, LINE)
            mbarrier.wait(q_empty.index(stage), phase ^ 1)
            mbarrier.expect(q_full.index(stage), q.block_type.nbytes)
            tma.async_copy_global_to_shared(q, [b, h, token, 0], q_full.index(stage), q_tiles.index(stage))
            async_copy.async_copy_global_to_shared(lse_tiles.index(stage), lse + at_row)
            async_copy.async_copy_global_to_shared(delta_tiles.index(stage), delta + at_row)
            async_copy.mbarrier_arrive(q_full.index(stage), increment_count=False)
            mbarrier.wait(do_empty.index(stage), phase ^ 1)
            mbarrier.expect(do_full.index(stage), grad_out.block_type.nbytes)
            tma.async_copy_global_to_shared(grad_out, [b, h, token, 0], do_full.index(stage), do_tiles.index(stage))
            loaded += 1
        done += 1
        index = take(dealt, total)
    slot = done % KEPT
    mbarrier.wait(k_empty.index(slot), ((done // KEPT) & 1) ^ 1)
    tell(told, slot, -1, 0, 0, 0, 0, 0, -1)
    mbarrier.arrive(k_full.index(slot))


@gluon.jit
def _weigh(
    s,
    i,
    cut,
    stage,
    entries,
    q_starts,
    begin,
    k_position,
    scale,
    lse_tiles,
    Q_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):
    """Weights (keys, queries) of tile ``i``; the diagonal cuts those before ``cut``."""
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    if CAUSAL:
        if i < cut:
            PER: gl.constexpr = Q_BLOCK // COLS
            block = gl.load(entries + begin + i // PER) & BLOCK_BITS
            first = block * Q_BLOCK
            if q_starts is not None:
                first = gl.load(q_starts + block).to(gl.int32)
            q_position = first + (i % PER) * COLS + gl.arange(0, COLS, COL)
            s = gl.where(k_position[:, None] <= q_position[None, :], s, float("-inf"))
    row_lse = lse_tiles.index(stage).load(COL)
    row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2E
    return gl.exp2(s * scale - row_lse[None, :])


@gluon.jit
def _consume(group: gl.constexpr, shared, barriers, lists, results, optional, form: gl.constexpr):
    """The gradients of 64 keys and values over the tiles, and the store of what comes of it."""
    Q_BLOCK: gl.constexpr = form[0]
    KV_BLOCK: gl.constexpr = form[1]
    COLS: gl.constexpr = form[2]
    KEPT: gl.constexpr = form[3]
    STAGES: gl.constexpr = form[4]
    GROUPS: gl.constexpr = form[5]
    D: gl.constexpr = form[6]
    CAUSAL: gl.constexpr = form[7]
    PART: gl.constexpr = form[8]
    k_tiles, v_tiles, q_tiles, do_tiles, lse_tiles, delta_tiles = shared
    k_full, q_full, do_full, k_empty, q_empty, do_empty, told = barriers
    entries, kv_heads = lists
    grad_k, grad_v, kv_tokens, scale = results
    part_k, part_v, q_starts, kv_starts = optional
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    COL: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    PER: gl.constexpr = Q_BLOCK // COLS
    used = 0  # stages so far
    done = 0
    mbarrier.wait(k_full.index(0), 0)
    flat_head, kv_block, in_block, begin, turn, end, part_row = hear(told, 0)
    while flat_head >= 0:
        cut, tiles = (turn - begin) * PER, (end - begin) * PER
        b, kv_head = flat_head // kv_heads, flat_head % kv_heads
        slot = done % KEPT
        keys = k_tiles.index(GROUPS * slot + group)._reinterpret(k_tiles.dtype, [GROUP_ROWS, D], FLAT)
        values = v_tiles.index(GROUPS * slot + group)._reinterpret(k_tiles.dtype, [GROUP_ROWS, D], FLAT)
        row = in_block + group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, ROW)
        k_position = kv_block * KV_BLOCK + row
        if kv_starts is not None:
            k_position = gl.load(kv_starts + kv_block).to(gl.int32) + row
        sums_k = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
        sums_v = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
        nothing = gl.zeros([GROUP_ROWS, COLS], gl.float32, S_LAYOUT)
        if tiles > 0:
            stage = used % STAGES
            queries = q_tiles.index(stage)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
            grads = do_tiles.index(stage)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(q_full.index(stage), (used // STAGES) & 1)
            s_token = warpgroup_mma(keys, queries.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(stage), (used // STAGES) & 1)
            w_token = warpgroup_mma(values, grads.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            weights = _weigh(
                s,
                0,
                cut,
                stage,
                entries,
                q_starts,
                begin,
                k_position,
                scale,
                lse_tiles,
                Q_BLOCK,
                COLS,
                CAUSAL,
                S_LAYOUT,
            )
            of_weights = warpgroup_mma_wait(0, deps=[w_token])
            of_scores = weights * (of_weights - delta_tiles.index(stage).load(COL)[None, :])
            p = gl.convert_layout(weights.to(q_tiles.dtype), P_LAYOUT)
            d = gl.convert_layout(of_scores.to(q_tiles.dtype), P_LAYOUT)
            for i in range(1, tiles):
                at = used + i
                stage = at % STAGES
                before = (at - 1) % STAGES
                queries = q_tiles.index(stage)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
                grads = do_tiles.index(stage)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
                queries_before = q_tiles.index(before)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
                grads_before = do_tiles.index(before)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
                mbarrier.wait(q_full.index(stage), (at // STAGES) & 1)
                s_token = warpgroup_mma(keys, queries.permute((1, 0)), nothing, use_acc=False, is_async=True)
                v_token = warpgroup_mma(p, grads_before, sums_v, is_async=True)
                k_token = warpgroup_mma(d, queries_before, sums_k, is_async=True)
                s = warpgroup_mma_wait(2, deps=[s_token])
                weights = _weigh(
                    s,
                    i,
                    cut,
                    stage,
                    entries,
                    q_starts,
                    begin,
                    k_position,
                    scale,
                    lse_tiles,
                    Q_BLOCK,
                    COLS,
                    CAUSAL,
                    S_LAYOUT,
                )
                mbarrier.wait(do_full.index(stage), (at // STAGES) & 1)
                sums_v = warpgroup_mma_wait(1, deps=[v_token])
                mbarrier.arrive(do_empty.index(before))
                sums_k = warpgroup_mma_wait(0, deps=[k_token])
                mbarrier.arrive(q_empty.index(before))
                w_token = warpgroup_mma(values, grads.permute((1, 0)), nothing, use_acc=False, is_async=True)
                p = gl.convert_layout(weights.to(q_tiles.dtype), P_LAYOUT)
                of_weights = warpgroup_mma_wait(0, deps=[w_token])
                of_scores = weights * (of_weights - delta_tiles.index(stage).load(COL)[None, :])
                d = gl.convert_layout(of_scores.to(q_tiles.dtype), P_LAYOUT)
            used += tiles
            stage = (used - 1) % STAGES
            queries = q_tiles.index(stage)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
            grads = do_tiles.index(stage)._reinterpret(q_tiles.dtype, [COLS, D], FLAT)
            v_token = warpgroup_mma(p, grads, sums_v, is_async=True)
            k_token = warpgroup_mma(d, queries, sums_k, is_async=True)
            sums_v = warpgroup_mma_wait(1, deps=[v_token])
            mbarrier.arrive(do_empty.index(stage))
            sums_k = warpgroup_mma_wait(0, deps=[k_token])
            mbarrier.arrive(q_empty.index(stage))
        sums_k = sums_k * (scale / LOG2E)
        if part_k is not None:
            if part_row >= 0:
                rows = part_row.to(gl.int64) * KV_BLOCK + in_block + group * GROUP_ROWS
                rows = rows + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, O_LAYOUT))
                dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                gl.store(part_k + rows[:, None] * D + dim[None, :], sums_k)
                gl.store(part_v + rows[:, None] * D + dim[None, :], sums_v)
        if part_row == -1:
            first = kv_block * KV_BLOCK + in_block + group * GROUP_ROWS
            if PART:
                token = first + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, O_LAYOUT))
                dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                at = ((flat_head.to(gl.int64) * kv_tokens + token) * D)[:, None] + dim[None, :]
                gl.store(grad_k + at, sums_k, mask=(token < kv_tokens)[:, None])
                gl.store(grad_v + at, sums_v, mask=(token < kv_tokens)[:, None])
            else:
                keys.store(sums_k.to(k_tiles.dtype))
                values.store(sums_v.to(k_tiles.dtype))
                fence_async_shared()
                at_first = [b, kv_head, first, 0]
                tma.async_copy_shared_to_global(grad_k, at_first, k_tiles.index(GROUPS * slot + group))
                tma.async_copy_shared_to_global(grad_v, at_first, v_tiles.index(GROUPS * slot + group))
                tma.store_wait(0)
        mbarrier.arrive(k_empty.index(slot))
        done += 1
        mbarrier.wait(k_full.index(done % KEPT), (done // KEPT) & 1)
        flat_head, kv_block, in_block, begin, turn, end, part_row = hear(told, done % KEPT)


@gluon.jit(
    do_not_specialize=[
        "groups",
        "kv_blocks",
        "parts",
        "heads",
        "queries_per_kv",
        "q_tokens",
        "kv_tokens",
        "item_count",
        "total",
    ]
)
def grad_kv_walk_kernel(
    q,
    k,
    v,
    grad_out,
    grad_k,
    grad_v,
    lse,
    delta,
    part_k,
    part_v,
    items,
    entries,
    q_starts,
    kv_starts,
    dealt,
    groups,
    kv_blocks,
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
    PART: gl.constexpr,
):
    """A program takes works (item, 64 keys a group of warps, copy of the columns' group) until none is left."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS * KEPT, 1, 1, GROUP_ROWS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS * KEPT, 1, 1, GROUP_ROWS, D], v.layout)
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, COLS, D], q.layout)
    do_tiles = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, COLS, D], grad_out.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, COLS], PLAIN)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, COLS], PLAIN)
    k_full = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int32, [KEPT * FACTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(KEPT):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1 + LANES)  # each lane's lse and delta arrive by themselves
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
        mbarrier.init(do_empty.index(i), count=GROUPS)
    fence_async_shared()
    shared = (k_tiles, v_tiles, q_tiles, do_tiles, lse_tiles, delta_tiles)
    barriers = (k_full, q_full, do_full, k_empty, q_empty, do_empty, told)
    plan = (items, entries, total, groups, kv_blocks, parts, item_count, heads // queries_per_kv)
    lists = (entries, heads // queries_per_kv)
    results = (grad_k, grad_v, kv_tokens, scale)
    optional = (part_k, part_v, q_starts, kv_starts)
    rows = (lse, delta, q_tokens)
    form: gl.constexpr = (Q_BLOCK, KV_BLOCK, COLS, KEPT, STAGES, GROUPS, D, CAUSAL, PART)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, shared, barriers, lists, results, optional, form)),
                (_consume, (1, shared, barriers, lists, results, optional, form)),
                (_produce, (q, k, v, grad_out, rows, queries_per_kv, dealt, shared, barriers, plan, form)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, shared, barriers, lists, results, optional, form)),
                (_produce, (q, k, v, grad_out, rows, queries_per_kv, dealt, shared, barriers, plan, form)),
            ],
            [1],
            [24],
        )
