"""dQ on Hopper, with warps that only load (``gluon_walk``); it makes delta on the way, for itself and for dK/dV.

The rows of the output, of which delta is made, come through the stages of keys (the first group's) and of values (the
second's), before the first tile of a work. For a part of a row's keys, as a ring visits them, delta is given, and the
gradient is float32.
"""

from __future__ import annotations

import torch
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
from raybsa.kernels.gluon_walk import GROUP_ROWS, LOG2E, Form, Walk, hear, is_plain
from raybsa.kernels.triton_arguments import Numbers, Softmax, feature_tensors
from raybsa.kernels.triton_descriptors import Boxes
from raybsa.kernels.triton_launch import Tensors
from raybsa.kernels.triton_plan import Work


def grad_q_form(call: AttentionCall, forward: Softmax, grad_out: Tensor, dtype: torch.dtype) -> Form | None:
    """How this kernel serves the call; None where it does not, or where the tiled kernel was measured to be faster."""
    layout, head_dim = call.layout, call.q.shape[-1]
    form = None
    if layout.q_block_size % 128 == 0 and layout.kv_block_size % 64 == 0 and head_dim in (64, 128):
        form = Form(2, 64, 2, 6 if head_dim == 64 else 3)
    elif layout.q_block_size == layout.kv_block_size == 64 and head_dim == 128:
        form = Form(1, 64, 1, 2)
    fits = grad_out.dtype == call.q.dtype and dtype == (torch.float32 if forward.out is None else call.q.dtype)
    return form if form and fits and is_plain(call) and _boxes(call, form, forward, grad_out, call.q) else None


class GradQWalk:
    """The launch of ``grad_q_walk_kernel``; of a part of the keys the gradient is contiguous."""

    def __init__(self, call: AttentionCall, forward: Softmax, work: Work, form: Form) -> None:
        layout, (batch, heads, _, head_dim) = call.layout, call.q.shape
        copies = batch * heads // layout.num_groups
        self._walk = Walk(grad_q_walk_kernel, form, work, layout.q_block_size, copies, call.q.device)
        counts = (layout.num_groups, layout.num_q_blocks, work.parts)
        self._numbers = Numbers(counts, call, (self._walk.works, self._walk.total))
        cuts = layout.causal or layout.kv_tokens % layout.kv_block_size != 0
        blocks = (layout.q_block_size, layout.kv_block_size)
        sizes = (form.cols, head_dim, form.kept, form.stages, form.groups)
        self._part = forward.out is None
        self._constants = (*blocks, *sizes, layout.causal, cuts, self._part)
        self._form = form

    def __call__(
        self,
        call: AttentionCall,
        forward: Softmax,
        delta: Tensor,
        grad_out: Tensor,
        grad: Tensor,
        parts: Tensor | None,
        work: Work,
    ) -> None:
        tensors: Tensors = (call.q, call.k, call.v, grad_out, forward.out, grad, _flat(forward.grad_lse), forward.lse)
        tensors = (*tensors, delta, parts, work.items, call.layout.col_indices)
        tensors = (*tensors, *feature_tensors(call)[:2])
        result = None if self._part else grad
        self._walk(
            tensors, self._numbers(call), self._constants, lambda: _boxes(call, self._form, forward, grad_out, result)
        )


def _boxes(call: AttentionCall, form: Form, forward: Softmax, grad_out: Tensor, grad: Tensor | None) -> Boxes:
    layout = call.layout
    kept, walked = {0: call.q, 3: grad_out, 4: forward.out, 5: grad}, {1: call.k, 2: call.v}
    return form.boxes(layout.q_block_size, layout.kv_block_size, kept, walked)


def _flat(grad_lse: Tensor | None) -> Tensor | None:
    return None if grad_lse is None else grad_lse.float().contiguous()


@gluon.jit
def _consume(group: gl.constexpr, shared, barriers, lists, results, optional, form: gl.constexpr):
    """The gradients of 64 queries over the tiles: the products of the next scores start before this tile's last one."""
    Q_BLOCK: gl.constexpr = form[0]
    KV_BLOCK: gl.constexpr = form[1]
    COLS: gl.constexpr = form[2]
    KEPT: gl.constexpr = form[3]
    STAGES: gl.constexpr = form[4]
    GROUPS: gl.constexpr = form[5]
    D: gl.constexpr = form[6]
    CUTS: gl.constexpr = form[7]
    CAUSAL: gl.constexpr = form[8]
    PART: gl.constexpr = form[9]
    q_tiles, do_tiles, k_tiles, v_tiles = shared
    q_full, k_full, v_full, q_empty, k_empty, v_empty, told = barriers
    col_indices, heads = lists
    grad, lse, delta, q_tokens, kv_tokens, scale = results
    grad_lse, part_grad, q_starts, kv_starts = optional
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    PER: gl.constexpr = KV_BLOCK // COLS
    used = 0  # stages so far
    done = 0
    mbarrier.wait(q_full.index(0), 0)
    flat_head, q_block, in_block, begin, turn, end, part_row = hear(told, 0)
    while flat_head >= 0:
        whole, tiles = (turn - begin) * PER, (end - begin) * PER
        b, h = flat_head // heads, flat_head % heads
        slot = done % KEPT
        q_tile = q_tiles.index(GROUPS * slot + group)._reinterpret(q_tiles.dtype, [GROUP_ROWS, D], FLAT)
        do_tile = do_tiles.index(GROUPS * slot + group)._reinterpret(q_tiles.dtype, [GROUP_ROWS, D], FLAT)
        row = in_block + group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, ROW)
        q_token = q_block * Q_BLOCK + row
        q_position = q_token
        if q_starts is not None:
            q_position = gl.load(q_starts + q_block).to(gl.int32) + row
        at_row = flat_head.to(gl.int64) * q_tokens + q_token
        inside = q_token < q_tokens
        row_lse = gl.load(lse + at_row, mask=inside, other=float("inf"))
        row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2E
        if PART:
            row_delta = gl.load(delta + at_row, mask=inside, other=0.0)
        else:
            stage = used % STAGES
            mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
            mbarrier.wait(v_full.index(stage), (used // STAGES) & 1)
            out_tile = (k_tiles if group == 0 else v_tiles).index(stage)
            outs = out_tile._reinterpret(q_tiles.dtype, [GROUP_ROWS, D], FLAT).load(O_LAYOUT).to(gl.float32)
            fence_async_shared()  # the loads have ended before the next tile may come
            mbarrier.arrive(k_empty.index(stage))
            mbarrier.arrive(v_empty.index(stage))
            used += 1
            row_delta = gl.convert_layout(gl.sum(outs * do_tile.load(O_LAYOUT).to(gl.float32), 1), ROW)
            if grad_lse is not None:
                row_delta -= gl.load(grad_lse + at_row, mask=inside, other=0.0)
            gl.store(delta + at_row, row_delta, mask=inside)
        acc = gl.zeros([GROUP_ROWS, D], gl.float32, O_LAYOUT)
        if tiles > 0:
            nothing = gl.zeros([GROUP_ROWS, COLS], gl.float32, S_LAYOUT)
            stage = used % STAGES
            keys = k_tiles.index(stage)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
            values = v_tiles.index(stage)._reinterpret(v_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
            s_token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), (used // STAGES) & 1)
            w_token = warpgroup_mma(do_tile, values.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            if CUTS:
                s = hide_keys(
                    s, 0, whole, col_indices, kv_starts, begin, q_position, kv_tokens, KV_BLOCK, COLS, CAUSAL, S_LAYOUT
                )
            weights = gl.exp2(s * scale - row_lse[:, None])
            of_weights = warpgroup_mma_wait(0, deps=[w_token])
            mbarrier.arrive(v_empty.index(stage))
            of_scores = weights * (of_weights - row_delta[:, None])
            d = gl.convert_layout(of_scores.to(k_tiles.dtype), P_LAYOUT)
            for i in range(1, tiles):
                at = used + i
                stage = at % STAGES
                before = (at - 1) % STAGES
                keys = k_tiles.index(stage)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
                values = v_tiles.index(stage)._reinterpret(v_tiles.dtype, [COLS, D], FLAT)
                keys_before = k_tiles.index(before)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
                mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
                s_token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), (at // STAGES) & 1)
                w_token = warpgroup_mma(do_tile, values.permute((1, 0)), nothing, use_acc=False, is_async=True)
                d_token = warpgroup_mma(d, keys_before, acc, is_async=True)
                s = warpgroup_mma_wait(2, deps=[s_token])
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
                weights = gl.exp2(s * scale - row_lse[:, None])
                of_weights = warpgroup_mma_wait(1, deps=[w_token])
                mbarrier.arrive(v_empty.index(stage))
                of_scores = weights * (of_weights - row_delta[:, None])
                acc = warpgroup_mma_wait(0, deps=[d_token])
                mbarrier.arrive(k_empty.index(before))
                d = gl.convert_layout(of_scores.to(k_tiles.dtype), P_LAYOUT)
            used += tiles
            last = (used - 1) % STAGES
            keys_last = k_tiles.index(last)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
            d_token = warpgroup_mma(d, keys_last, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[d_token])
            mbarrier.arrive(k_empty.index(last))
        acc = acc * (scale / LOG2E)
        if part_grad is not None:
            if part_row >= 0:
                rows = part_row.to(gl.int64) * Q_BLOCK + in_block + group * GROUP_ROWS
                rows = rows + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, O_LAYOUT))
                dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                gl.store(part_grad + rows[:, None] * D + dim[None, :], acc)
        if part_row < 0:
            first = q_block * Q_BLOCK + in_block + group * GROUP_ROWS
            if PART:
                token = first + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, O_LAYOUT))
                dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
                at = (flat_head.to(gl.int64) * q_tokens + token) * D
                gl.store(grad + at[:, None] + dim[None, :], acc, mask=(token < q_tokens)[:, None])
            else:
                q_tile.store(acc.to(q_tiles.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(grad, [b, h, first, 0], q_tiles.index(GROUPS * slot + group))
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
def grad_q_walk_kernel(
    q,
    k,
    v,
    grad_out,
    out,
    grad,
    grad_lse,
    lse,
    delta,
    part_grad,
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
    PART: gl.constexpr,
):
    """A program takes works (item, 64 queries a group of warps, copy of the layout's group) until none is left."""
    gl.static_assert(COLS == GROUP_ROWS)  # rows of the output lie where a tile does
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS * KEPT, 1, 1, GROUP_ROWS, D], q.layout)
    do_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS * KEPT, 1, 1, GROUP_ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, COLS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, COLS, D], v.layout)
    shared = (q_tiles, do_tiles, k_tiles, v_tiles)
    barriers = row_barriers(KEPT, STAGES, GROUPS)
    plan = (items, col_indices, total, groups, q_blocks, parts, item_count, heads)
    lists = (col_indices, heads)
    results = (grad, lse, delta, q_tokens, kv_tokens, scale)
    optional = (grad_lse, part_grad, q_starts, kv_starts)
    form: gl.constexpr = (Q_BLOCK, KV_BLOCK, COLS, KEPT, STAGES, GROUPS, D, CUTS, CAUSAL, PART)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, shared, barriers, lists, results, optional, form)),
                (_consume, (1, shared, barriers, lists, results, optional, form)),
                (produce_rows, (q, k, v, grad_out, out, queries_per_kv, dealt, shared, barriers, plan, form)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, shared, barriers, lists, results, optional, form)),
                (produce_rows, (q, k, v, grad_out, out, queries_per_kv, dealt, shared, barriers, plan, form)),
            ],
            [1],
            [24],
        )
