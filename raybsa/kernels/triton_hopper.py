"""The forward on Hopper, with warps that only load: FlashAttention-3's schedule (2407.08608) in Triton's Gluon.

A processor runs one program, which takes every n-th work (an item of the plan, 128 of its queries). Its warps form
three groups. One issues the loads: queries, then tiles of K and V, and on to the next work while this one is computed.
Two take 64 queries each, and start the product of the next scores before the softmax of these, so that tensor cores and
exponentials overlap. Blocks of 64 have one such group, and a processor two programs. For plain calls (no mask,
segments, bias or dropout) of 16 bits and the sizes that ``Form`` knows; the result equals ``triton_forward``'s up to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.triton_arguments import feature_tensors, numbers
from raybsa.kernels.triton_descriptors import Boxes, boxes_of
from raybsa.kernels.triton_launch import Launcher, Tensors, launcher
from raybsa.kernels.triton_plan import Work
from raybsa.kernels.triton_setup import processors
from raybsa.kernels.triton_tiles import Tile

GROUP_ROWS = gl.constexpr(64)  # queries of one group of warps
KEPT = gl.constexpr(2)  # works whose queries shared memory holds
CACHED = 25 << 20  # bytes of K and V of a head, half of L2


@dataclass(frozen=True)
class Form:
    """How a program is cut.

    Args:
        groups: of warps that compute, 64 queries each; with one of them a processor runs two programs.
        cols: keys of a tile.
        stages: tiles of K and of V that shared memory holds, beside two works' queries.
    """

    groups: int
    cols: int
    stages: int

    @property
    def programs(self) -> int:
        """A processor's."""
        return 2 // self.groups

    @staticmethod
    def of(q_block: int, kv_block: int, head_dim: int, kv_tokens: int) -> Form | None:
        """For these sizes and 16 bits; None where there is none, or where the tiled kernel was measured to be faster:
        one group of warps with head_dim 64, or with more keys than L2 holds."""
        if q_block % 128 == 0 and kv_block % 128 == 0 and head_dim in (64, 128):
            return Form(2, 128, 4 if head_dim == 64 else 2)
        if q_block == kv_block == 64 and head_dim == 128 and 4 * kv_tokens * head_dim <= CACHED:
            return Form(1, 64, 2)
        return None


class HopperWalk:
    """The launch of ``hopper_forward_kernel``."""

    def __init__(self, call: AttentionCall, work: Work, form: Form) -> None:
        layout, (batch, heads) = call.layout, call.q.shape[:2]
        works = work.items.shape[0] * (layout.q_block_size // (form.groups * GROUP_ROWS.value))
        total = works * (batch * heads // layout.num_groups)
        plain = numbers(call)[:5]  # without what serves dropout
        self._numbers = (layout.num_groups, layout.num_q_blocks, work.parts, *plain, works, total)
        self._programs = (min(form.programs * processors(call.q.device), total), 1)
        self._form = form
        self._launch: Launcher | None = None

    def __call__(self, call: AttentionCall, tensors: Tensors) -> None:
        tensors = (*tensors, *feature_tensors(call)[:2])  # where the blocks lie in the sequence
        if self._launch is None:
            self._launch = self._launcher(call, tensors)
        self._launch(self._programs, tensors, self._numbers)

    def _launcher(self, call: AttentionCall, tensors: Tensors) -> Launcher:
        layout, form = call.layout, self._form
        boxes = boxes_for(call, form, tensors[3])
        cuts = layout.causal or layout.kv_tokens % layout.kv_block_size != 0
        sizes = (layout.q_block_size, layout.kv_block_size, form.cols, call.q.shape[-1], form.stages, form.groups)
        constants = (*sizes, layout.causal, cuts)
        registers = 128 if form.programs == 2 else None  # of a thread, before the groups trade them
        return launcher(
            hopper_forward_kernel, tensors, (), constants, 4, 1, boxes, describe=_descriptor, registers=registers
        )


def boxes_for(call: AttentionCall, form: Form, out: Tensor | None) -> Boxes:
    """What goes in as descriptors, and its tiles; empty where a tensor's strides or address do not allow it."""
    layout, tile = call.layout, Tile(GROUP_ROWS.value, form.cols, 4, form.stages, True)
    kept = boxes_of(tile, layout.q_block_size, tile.rows, {0: call.q, 3: out})
    walked = boxes_of(tile, layout.kv_block_size, tile.cols, {1: call.k, 2: call.v})
    return kept + walked if kept and walked else ()


def _descriptor(tensor: Tensor, box: tuple[int, ...]) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


@gluon.jit
def _place(items, index, total, groups, q_blocks, parts, item_count, Q_BLOCK: gl.constexpr, GROUPS: gl.constexpr):
    """Of work ``index``: its flat head, query block, first query in it, begin, turn and end, and its part or -1."""
    TURNS: gl.constexpr = Q_BLOCK // (GROUPS * GROUP_ROWS)
    index = gl.minimum(index, total - 1)
    copy = index // item_count
    number = index % item_count
    item = items + (number // TURNS) * 8
    line, begin, turn = gl.load(item), gl.load(item + 1), gl.load(item + 2)
    end, part = gl.load(item + 3), gl.load(item + 4)
    flat_head = copy * groups + line // q_blocks
    part_row = gl.where(part >= 0, copy * parts + part, -1)
    return flat_head, line % q_blocks, (number % TURNS) * GROUPS * GROUP_ROWS, begin, turn, end, part_row


@gluon.jit
def _produce(
    q,
    k,
    v,
    queries_per_kv,
    shared,
    plan,
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Loads queries and tiles in turn, each when both groups have done with what lay there."""
    q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, q_empty, k_empty, v_empty = shared
    items, col_indices, total, groups, q_blocks, parts, item_count, heads = plan
    PER: gl.constexpr = KV_BLOCK // COLS
    loaded = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        done = index // gl.num_programs(0)
        flat_head, q_block, in_block, begin, _turn, end, _part_row = _place(
            items, index, total, groups, q_blocks, parts, item_count, Q_BLOCK, GROUPS
        )
        b, h = flat_head // heads, flat_head % heads
        kv_head = h // queries_per_kv
        slot = done % KEPT
        first = q_block * Q_BLOCK + in_block
        mbarrier.wait(q_empty.index(slot), ((done // KEPT) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), GROUPS * q.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            at = [b, h, first + group * GROUP_ROWS, 0]
            tma.async_copy_global_to_shared(q, at, q_full.index(slot), q_tiles.index(GROUPS * slot + group))
        for i in range((end - begin) * PER):
            stage = loaded % STAGES
            phase = (loaded // STAGES) & 1
            token = gl.load(col_indices + begin + i // PER) * KV_BLOCK + (i % PER) * COLS
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            tma.async_copy_global_to_shared(k, [b, kv_head, token, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, [b, kv_head, token, 0], v_full.index(stage), v_tiles.index(stage))
            loaded += 1


@gluon.jit
def _hide(
    s,
    i,
    whole,
    col_indices,
    kv_starts,
    begin,
    q_position,
    kv_tokens,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    CAUSAL: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Scores of tile ``i`` with what the diagonal or the ragged end cuts at -inf; nothing is cut before ``whole``."""
    if i >= whole:
        PER: gl.constexpr = KV_BLOCK // COLS
        block = gl.load(col_indices + begin + i // PER)
        lane = (i % PER) * COLS + gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))
        s = gl.where((block * KV_BLOCK + lane < kv_tokens)[None, :], s, float("-inf"))
        if CAUSAL:
            first = block * KV_BLOCK
            if kv_starts is not None:
                first = gl.load(kv_starts + block).to(gl.int32)
            s = gl.where((first + lane)[None, :] <= q_position[:, None], s, float("-inf"))
    return s


@gluon.jit
def _consume(
    group: gl.constexpr,
    shared,
    plan,
    results,
    optional,
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    D: gl.constexpr,
    CUTS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """The online softmax of 64 queries over the tiles, and the store of what comes of it."""
    q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, q_empty, k_empty, v_empty = shared
    items, col_indices, total, groups, q_blocks, parts, item_count, heads = plan
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
    next_head, next_q_block, next_in_block, next_begin, next_turn, next_end, next_part_row = _place(
        items, gl.program_id(0), total, groups, q_blocks, parts, item_count, Q_BLOCK, GROUPS
    )
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        done = index // gl.num_programs(0)
        flat_head, q_block, in_block, part_row = next_head, next_q_block, next_in_block, next_part_row
        begin, whole, tiles = next_begin, (next_turn - next_begin) * PER, (next_end - next_begin) * PER
        next_head, next_q_block, next_in_block, next_begin, next_turn, next_end, next_part_row = _place(
            items, index + gl.num_programs(0), total, groups, q_blocks, parts, item_count, Q_BLOCK, GROUPS
        )
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
        mbarrier.wait(q_full.index(slot), (done // KEPT) & 1)
        if tiles > 0:
            nothing = gl.zeros([GROUP_ROWS, COLS], gl.float32, S_LAYOUT)
            stage = used % STAGES
            keys = k_tiles.index(stage)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
            token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(k_empty.index(stage))
            if CUTS:
                s = _hide(
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
                    s = _hide(
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
def hopper_forward_kernel(
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
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    CAUSAL: gl.constexpr,
    CUTS: gl.constexpr,
):
    """A program walks every n-th of the works (item and 128 queries within the query block, copy of the group)."""
    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS * KEPT, 1, 1, GROUP_ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, COLS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, COLS, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(KEPT):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    shared = (q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, q_empty, k_empty, v_empty)
    plan = (items, col_indices, total, groups, q_blocks, parts, item_count, heads)
    results = (out, lse, q_tokens, kv_tokens, scale)
    optional = (part_out, part_lse, q_starts, kv_starts)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (0, shared, plan, results, optional, Q_BLOCK, KV_BLOCK, COLS, STAGES, GROUPS, D, CUTS, CAUSAL),
                ),
                (
                    _consume,
                    (1, shared, plan, results, optional, Q_BLOCK, KV_BLOCK, COLS, STAGES, GROUPS, D, CUTS, CAUSAL),
                ),
                (_produce, (q, k, v, queries_per_kv, shared, plan, Q_BLOCK, KV_BLOCK, COLS, STAGES, GROUPS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (0, shared, plan, results, optional, Q_BLOCK, KV_BLOCK, COLS, STAGES, GROUPS, D, CUTS, CAUSAL),
                ),
                (_produce, (q, k, v, queries_per_kv, shared, plan, Q_BLOCK, KV_BLOCK, COLS, STAGES, GROUPS)),
            ],
            [1],
            [24],
        )
