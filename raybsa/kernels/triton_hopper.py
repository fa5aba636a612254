"""The forward on Hopper, with warps that only load: FlashAttention-3's schedule (2407.08608) in Triton's Gluon.

A program has three groups of warps. One issues the loads of K and V tiles; two take 64 queries each, and start the
product of the next scores before the softmax of these, so that tensor cores and exponentials overlap. For plain calls
(no mask, segments, bias or dropout) of 16 bits, head_dim 64 or 128 and blocks of 128 queries or more, whose result
equals ``triton_forward``'s up to rounding.
"""

from __future__ import annotations

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
from raybsa.kernels.triton_arguments import feature_tensors
from raybsa.kernels.triton_descriptors import boxes_of
from raybsa.kernels.triton_launch import Launcher, Tensors, launcher
from raybsa.kernels.triton_tiles import Tile

COLS_OF, STAGES_OF = 128, {64: 4, 128: 3}  # keys of a tile; tiles of K and of V that shared memory holds, by head_dim
REGISTERS_OF_A_CONSUMER = 240


def arguments(tensors: Tensors, call: AttentionCall) -> Tensors:
    """Of ``forward_kernel``'s tensors those that this kernel takes."""
    return (*tensors[:9], *feature_tensors(call)[:2])


def launcher_of(call: AttentionCall, tensors: Tensors) -> Launcher:
    """The launcher of ``hopper_forward_kernel`` for ``arguments``."""
    layout, head_dim = call.layout, call.q.shape[-1]
    tile = Tile(64, COLS_OF, 4, STAGES_OF[head_dim], True)
    kept = boxes_of(tile, layout.q_block_size, tile.rows, {0: call.q, 3: tensors[3]})
    walked = boxes_of(tile, layout.kv_block_size, tile.cols, {1: call.k, 2: call.v})
    cuts = layout.causal or layout.kv_tokens % layout.kv_block_size != 0
    sizes = (layout.q_block_size, layout.kv_block_size, tile.cols, head_dim, tile.stages)
    constants = (*sizes, layout.causal, cuts, REGISTERS_OF_A_CONSUMER)
    return launcher(
        hopper_forward_kernel, tensors, (), constants, tile.warps, tile.stages, kept + walked, describe=_descriptor
    )


def _descriptor(tensor: Tensor, box: tuple[int, ...]) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


ROWS = gl.constexpr(64)  # queries of one group of warps


@gluon.jit
def _produce(
    k,
    v,
    k_tiles,
    v_tiles,
    k_full,
    v_full,
    k_empty,
    v_empty,
    col_indices,
    begin,
    tiles,
    b,
    kv_head,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Loads the tiles in turn, each when both groups have done with what lay there."""
    PER: gl.constexpr = KV_BLOCK // COLS
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        token = gl.load(col_indices + begin + i // PER) * KV_BLOCK + (i % PER) * COLS
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [b, kv_head, token, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [b, kv_head, token, 0], v_full.index(stage), v_tiles.index(stage))


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
    q_tiles,
    k_tiles,
    v_tiles,
    q_full,
    k_full,
    v_full,
    k_empty,
    v_empty,
    out,
    lse,
    part_out,
    part_lse,
    col_indices,
    q_starts,
    kv_starts,
    begin,
    whole,
    tiles,
    part_row,
    flat_head,
    b,
    h,
    q_block,
    in_block,
    q_tokens,
    kv_tokens,
    scale,
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CUTS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """The online softmax of 64 queries over the tiles, and the store of what comes of it."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_OUT: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    q_tile = q_tiles.index(group)._reinterpret(q_tiles.dtype, [ROWS, D], FLAT)
    row = in_block + group * ROWS + gl.arange(0, ROWS, ROW)
    q_token = q_block * Q_BLOCK + row
    q_position = q_token
    if q_starts is not None:
        q_position = gl.load(q_starts + q_block).to(gl.int32) + row
    lse_at = lse + flat_head.to(gl.int64) * q_tokens + q_token
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
    total = gl.zeros([ROWS], gl.float32, ROW)
    mbarrier.wait(q_full, 0)
    if tiles > 0:
        nothing = gl.zeros([ROWS, COLS], gl.float32, S_LAYOUT)
        keys = k_tiles.index(0)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
        mbarrier.wait(k_full.index(0), 0)
        token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_empty.index(0))
        if CUTS:
            s = _hide(
                s, 0, whole, col_indices, kv_starts, begin, q_position, kv_tokens, KV_BLOCK, COLS, CAUSAL, S_LAYOUT
            )
        top = gl.max(s, 1) * scale
        base = gl.where(top == float("-inf"), 0.0, top)
        weights = gl.exp2(s * scale - base[:, None])
        total = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(v_tiles.dtype), P_LAYOUT)
        for i in range(1, tiles):
            stage = i % STAGES
            keys = k_tiles.index(stage)._reinterpret(k_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            s_token = warpgroup_mma(q_tile, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
            before = (i - 1) % STAGES
            values = v_tiles.index(before)._reinterpret(v_tiles.dtype, [COLS, D], FLAT)
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            o_token = warpgroup_mma(p, values, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            if CUTS:
                s = _hide(
                    s, i, whole, col_indices, kv_starts, begin, q_position, kv_tokens, KV_BLOCK, COLS, CAUSAL, S_LAYOUT
                )
            new_top = gl.maximum(top, gl.max(s, 1) * scale)
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            weights = gl.exp2(s * scale - base[:, None])
            fade = gl.exp2(top - base)
            total = total * fade + gl.sum(weights, 1)
            top = new_top
            # Never true. It and the barrier of `arrive` hold the exponentials before the wait for the other product,
            # which ptxas would else move up.
            gl.store(lse_at, total, mask=total < 0.0)
            mbarrier.arrive(k_empty.index(stage))
            acc = warpgroup_mma_wait(0, deps=[o_token])
            mbarrier.arrive(v_empty.index(before))
            acc = acc * gl.convert_layout(fade, ROW_OUT)[:, None]
            p = gl.convert_layout(weights.to(v_tiles.dtype), P_LAYOUT)
        last = (tiles - 1) % STAGES
        values = v_tiles.index(last)._reinterpret(v_tiles.dtype, [COLS, D], FLAT)
        mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[o_token])
    safe = gl.where(total == 0.0, 1.0, total)
    natural = (top + gl.log2(safe)) * 0.6931471805599453
    acc = acc / gl.convert_layout(safe, ROW_OUT)[:, None]
    if part_out is not None:
        if part_row >= 0:
            part_at = part_row.to(gl.int64) * Q_BLOCK + in_block + group * ROWS
            gl.store(part_lse + part_at + gl.arange(0, ROWS, ROW), natural)
            rows = part_at + gl.arange(0, ROWS, ROW_OUT)
            dim = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
            gl.store(part_out + rows[:, None] * D + dim[None, :], acc)
    if part_row < 0:
        gl.store(lse_at, natural, mask=q_token < q_tokens)
        q_tile.store(acc.to(q_tiles.dtype))
        fence_async_shared()
        first = q_block * Q_BLOCK + in_block + group * ROWS
        tma.async_copy_shared_to_global(out, [b, h, first, 0], q_tiles.index(group))
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["groups", "q_blocks", "parts", "heads", "queries_per_kv", "q_tokens", "kv_tokens"])
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
    Q_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    COLS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    CUTS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Program (item and 128 queries within the query block, copy of the group)."""
    TURNS: gl.constexpr = Q_BLOCK // 128
    item = items + (gl.program_id(0) // TURNS) * 8
    line, begin, turn = gl.load(item), gl.load(item + 1), gl.load(item + 2)
    end, part = gl.load(item + 3), gl.load(item + 4)
    q_block = line % q_blocks
    flat_head = gl.program_id(1) * groups + line // q_blocks
    b, h = flat_head // heads, flat_head % heads
    in_block = (gl.program_id(0) % TURNS) * 128
    whole = (turn - begin) * (KV_BLOCK // COLS)
    tiles = (end - begin) * (KV_BLOCK // COLS)
    part_row = gl.where(part >= 0, gl.program_id(1) * parts + part, -1)

    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, COLS, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, COLS, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    first = q_block * Q_BLOCK + in_block
    mbarrier.expect(q_full, 2 * q.block_type.nbytes)
    tma.async_copy_global_to_shared(q, [b, h, first, 0], q_full, q_tiles.index(0))
    tma.async_copy_global_to_shared(q, [b, h, first + ROWS, 0], q_full, q_tiles.index(1))
    kv_head = h // queries_per_kv
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    q_full,
                    k_full,
                    v_full,
                    k_empty,
                    v_empty,
                    out,
                    lse,
                    part_out,
                    part_lse,
                    col_indices,
                    q_starts,
                    kv_starts,
                    begin,
                    whole,
                    tiles,
                    part_row,
                    flat_head,
                    b,
                    h,
                    q_block,
                    in_block,
                    q_tokens,
                    kv_tokens,
                    scale,
                    Q_BLOCK,
                    KV_BLOCK,
                    COLS,
                    D,
                    STAGES,
                    CUTS,
                    CAUSAL,
                ),
            ),
            (
                _consume,
                (
                    1,
                    q_tiles,
                    k_tiles,
                    v_tiles,
                    q_full,
                    k_full,
                    v_full,
                    k_empty,
                    v_empty,
                    out,
                    lse,
                    part_out,
                    part_lse,
                    col_indices,
                    q_starts,
                    kv_starts,
                    begin,
                    whole,
                    tiles,
                    part_row,
                    flat_head,
                    b,
                    h,
                    q_block,
                    in_block,
                    q_tokens,
                    kv_tokens,
                    scale,
                    Q_BLOCK,
                    KV_BLOCK,
                    COLS,
                    D,
                    STAGES,
                    CUTS,
                    CAUSAL,
                ),
            ),
            (
                _produce,
                (
                    k,
                    v,
                    k_tiles,
                    v_tiles,
                    k_full,
                    v_full,
                    k_empty,
                    v_empty,
                    col_indices,
                    begin,
                    tiles,
                    b,
                    kv_head,
                    KV_BLOCK,
                    COLS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
