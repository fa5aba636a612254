"""What the forward and dQ share on Hopper: both keep queries and walk the keys and values of their rows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from raybsa.kernels.gluon_walk import FACTS, GROUP_ROWS, place, take, tell


@gluon.jit
def row_barriers(KEPT: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Barriers of the kept tokens and of the tiles of keys and of values, full and empty, and room for what is told."""
    q_full = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    told = gl.allocate_shared_memory(gl.int32, [KEPT * FACTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(KEPT):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    return q_full, k_full, v_full, q_empty, k_empty, v_empty, told


@gluon.jit
def produce_rows(q, k, v, grad_out, out, queries_per_kv, dealt, shared, barriers, plan, form: gl.constexpr):
    """Loads the tokens of a work, and its tiles in turn, each when what lay there is done with.

    ``grad_out`` is kept beside q, where it is given; rows of ``out`` come through the stages of keys (the first
    group's) and of values (the second's), before the first tile.
    """
    Q_BLOCK: gl.constexpr = form[0]
    KV_BLOCK: gl.constexpr = form[1]
    COLS: gl.constexpr = form[2]
    KEPT: gl.constexpr = form[3]
    STAGES: gl.constexpr = form[4]
    GROUPS: gl.constexpr = form[5]
    PER: gl.constexpr = KV_BLOCK // COLS
    q_tiles, do_tiles, k_tiles, v_tiles = shared
    q_full, k_full, v_full, q_empty, k_empty, v_empty, told = barriers
    items, col_indices, total, groups, q_blocks, parts, item_count, heads = plan
    loaded = 0
    done = 0
    index = take(dealt, total)
    while index < total:
        flat_head, q_block, in_block, begin, turn, end, part_row = place(
            items, index, total, groups, q_blocks, parts, item_count, Q_BLOCK, GROUPS
        )
        b, h = flat_head // heads, flat_head % heads
        kv_head = h // queries_per_kv
        slot = done % KEPT
        first = q_block * Q_BLOCK + in_block
        if out is not None:
            stage = loaded % STAGES
            phase = (loaded // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), out.block_type.nbytes)
            tma.async_copy_global_to_shared(out, [b, h, first, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            if GROUPS == 2:
                mbarrier.expect(v_full.index(stage), out.block_type.nbytes)
                at = [b, h, first + GROUP_ROWS, 0]
                tma.async_copy_global_to_shared(out, at, v_full.index(stage), v_tiles.index(stage))
            else:
                mbarrier.arrive(v_full.index(stage))
            loaded += 1
        mbarrier.wait(q_empty.index(slot), ((done // KEPT) & 1) ^ 1)
        tell(told, slot, flat_head, q_block, in_block, begin, turn, end, part_row)
        SIDES: gl.constexpr = 1 if grad_out is None else 2
        mbarrier.expect(q_full.index(slot), SIDES * GROUPS * q.block_type.nbytes)
        for group in gl.static_range(GROUPS):
            at = [b, h, first + group * GROUP_ROWS, 0]
            tma.async_copy_global_to_shared(q, at, q_full.index(slot), q_tiles.index(GROUPS * slot + group))
            if grad_out is not None:
                tma.async_copy_global_to_shared(grad_out, at, q_full.index(slot), do_tiles.index(GROUPS * slot + group))
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
        done += 1
        index = take(dealt, total)
    slot = done % KEPT
    mbarrier.wait(q_empty.index(slot), ((done // KEPT) & 1) ^ 1)
    tell(told, slot, -1, 0, 0, 0, 0, 0, -1)
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def hide_keys(
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
    """Scores (queries, keys) of tile ``i`` of a row, with what the diagonal or the ragged end cuts at -inf.

    Nothing is cut before tile ``whole``.
    """
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
