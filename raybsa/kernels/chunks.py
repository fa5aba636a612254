"""How the blocked backend cuts a layout into batched matrix products: rows with equally many blocks share a chunk.

A chunk's working set stays near a bound (in cache on a CPU); a row too long for ``PIECE_BYTES`` is split into pieces
that are merged. Nothing here is larger than O(batch * heads * num_q_blocks + nnz).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall, compute_dtype
from raybsa.kernels.kept import kept_with
from raybsa.layout import BlockLayout

CPU_CHUNK_BYTES = 5 * 2**20  # for each thread
CUDA_CHUNK_BYTES = 128 * 2**20
PIECE_BYTES = 128 * 2**20
ROWS_A_THREAD = 4  # MKL runs a batch of fewer products than this on one thread


@dataclass(frozen=True)
class Chunk:
    """C query-block rows handled together. All tensors are (C,) int64.

    Args:
        row: flat row ``(b * H + h) * num_q_blocks + i``.
        span: the same as a slice where the rows follow one another, else None.
        head: flat head ``b * H + h``.
        kv_head: the flat KV head ``b * Hkv + h // (H // Hkv)`` that it reads.
        q_block: i.
        start: offset of the first block taken in ``layout.col_indices``.
        width: KV blocks taken of each row.
        first: how many of each row's blocks lie before these.
        whole: these are all the blocks of the rows.
        cut: the places ``0 .. width - 1`` at which some row's block is cut by the diagonal or by the ragged end.
    """

    row: Tensor
    span: slice | None
    head: Tensor
    kv_head: Tensor
    q_block: Tensor
    start: Tensor
    width: int
    first: int
    whole: bool
    cut: tuple[int, ...]


@dataclass(frozen=True)
class ChunkPlan:
    """Every kept block of every (batch, head) exactly once; the pieces of a row in ascending order.

    ``columns`` (nnz,) int64 are the layout's ``col_indices``; ``covers_rows`` says that no row is empty.
    """

    chunks: tuple[Chunk, ...]
    columns: Tensor
    covers_rows: bool


def plan_chunks(call: AttentionCall) -> ChunkPlan:
    """The plan of a call, kept as long as its layout lives."""
    batch, heads, _, head_dim = call.q.shape
    layout = call.layout
    slot = compute_dtype(call.q.dtype).itemsize * layout.kv_block_size * (2 * layout.q_block_size + 4 * head_dim)
    plans = kept_with(layout)
    threads = 1 if layout.device.type == "cuda" else torch.get_num_threads()
    sizes = (batch, heads, call.queries_per_kv, slot, threads)
    key = ("chunks", *sizes)
    if key not in plans:
        chunks = tuple(_chunks(layout, *sizes))
        plans[key] = ChunkPlan(chunks, layout.col_indices.long(), bool((layout.row_counts > 0).all()))
    found = plans[key]
    assert isinstance(found, ChunkPlan)
    return found


def _chunks(
    layout: BlockLayout, batch: int, heads: int, queries_per_kv: int, slot_bytes: int, threads: int
) -> Iterator[Chunk]:
    """All rows in ascending order of their number of blocks; ``slot_bytes`` is the working set of one block."""
    budget = CUDA_CHUNK_BYTES if layout.device.type == "cuda" else min(CPU_CHUNK_BYTES * threads, PIECE_BYTES)
    chunk_slots, piece_slots = max(1, budget // slot_bytes), max(1, PIECE_BYTES // slot_bytes)
    counts = _per_head(layout.row_counts, batch, heads)
    order = torch.argsort(counts, stable=True)
    starts = _per_head(layout.crow_indices[:, :-1], batch, heads)
    widths, sizes = (x.tolist() for x in torch.unique_consecutive(counts[order], return_counts=True))
    is_cut = _cut_blocks(layout)
    for width, rows in zip(widths, order.split(sizes), strict=True):
        for first in range(0, width, piece_slots):
            taken = min(piece_slots, width - first)
            for row in rows.split(_rows_in_chunk(chunk_slots // taken, piece_slots // taken, threads)):
                head, start = row // layout.num_q_blocks, starts[row] + first
                yield Chunk(
                    row,
                    _span(row),
                    head,
                    head // queries_per_kv,
                    row % layout.num_q_blocks,
                    start,
                    taken,
                    first,
                    taken == width,
                    _cut_places(is_cut, start, taken),
                )


def _rows_in_chunk(fitting: int, most: int, threads: int) -> int:
    """About as many rows as fit, a multiple of ``threads``, and enough for a batched product to use all threads."""
    return max(1, min(most, max(fitting - fitting % threads, ROWS_A_THREAD * threads)))


def _span(row: Tensor) -> slice | None:
    first, last = int(row[0]), int(row[-1])
    return slice(first, last + 1) if last - first + 1 == len(row) else None


def _per_head(per_group: Tensor, batch: int, heads: int) -> Tensor:
    """(G, n) -> (B * H * n,): each (batch, head)'s values from its group's."""
    groups = per_group.shape[0]
    shaped = per_group.view(batch if groups == batch * heads else 1, heads if groups > 1 else 1, -1)
    return shaped.expand(batch, heads, -1).reshape(-1)


def _cut_blocks(layout: BlockLayout) -> Tensor | None:
    """(nnz,) bool: blocks that causality or the ragged end cuts; None if there are none."""
    ragged = layout.kv_block_starts[layout.col_indices.long()] + layout.kv_block_size > layout.kv_len
    is_cut = layout.crosses_diagonal() | ragged
    return is_cut if bool(is_cut.any()) else None


def _cut_places(is_cut: Tensor | None, starts: Tensor, width: int) -> tuple[int, ...]:
    if is_cut is None:
        return ()
    places = torch.arange(width, device=starts.device)
    return tuple(is_cut[starts[:, None] + places].any(0).nonzero()[:, 0].tolist())
