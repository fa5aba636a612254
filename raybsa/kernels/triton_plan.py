"""The work plan of the Triton kernels: which program walks which part of which list of blocks.

Rows (lists of KV blocks) serve the forward and dQ, columns (lists of query blocks) serve dK/dV. A list longer than a
fair share of the whole work is split into parts that a second kernel adds up in a fixed order, so that one global row
or column does not hold up the launch. The longest items come first; all short ones stay in storage order, a head after
the other, so that what runs at one time reads the same keys and values. A plan is made once for a layout, on its
device, with O(nnz) tensor operations and one read back of three numbers. The columns of a transient layout are planned
anew in every step, so that costs a sort and little else: what its rows decide is kept with them, and nothing is read
back, for its plan is as long as any plan of so many blocks can be, with empty items at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with, kept_with_rows, offsets_decide_rows
from raybsa.kernels.triton_setup import processors
from raybsa.layout import BlockLayout

MIN_PART_TOKENS = 1024  # no list shorter than this is split
SHARES = 2  # a part is at most half of one processor's share of the work: shorter ones take memory and time to add up
ENOUGH = 2  # where there are so many lists a processor, those up to twice the mean stay whole
MEMBER_SHIFT = 22  # an entry of a column is ``(query head within its KV head << 22) | query block``
MAX_BLOCKS, MAX_MEMBERS = 2**MEMBER_SHIFT, 2 ** (31 - MEMBER_SHIFT)


@dataclass(frozen=True, eq=False)
class Work:
    """Items of work, one a program.

    Args:
        items: (n, 8) int32, the longest first: list, begin, turn, end, part, and three unused. ``begin .. end`` are
            places among all blocks; masking begins at ``turn`` in a row and ends there in a column; ``part`` is -1
            where the item is its whole list. An empty list has an item too, which writes its zeros. A ``part`` of -2
            says that nothing is to be written: columns of a transient layout only.
        splits: (m, 4) int32: list, first part, number of parts, one unused. No parts: nothing is to be written.
        parts: how many parts there are, or at most are.
    """

    items: Tensor
    splits: Tensor
    parts: int

    def sizes(self) -> tuple[int, int]:
        """How many items and how many split lists."""
        return self.items.shape[0], self.splits.shape[0]


@dataclass(frozen=True, eq=False)
class Columns:
    """The transposed lists, those of the query heads that share a KV head joined.

    Args:
        entries: (n,) int32, see ``MEMBER_SHIFT``; of each column first the blocks that the diagonal cuts.
        source: (n,) int32: each entry's place in the layout's storage order; None unless there is a block_bias.
        groups: how many different KV heads' lists there are.
        work: over the columns, ``group * num_kv_blocks + block``.
    """

    entries: Tensor
    source: Tensor | None
    groups: int
    work: Work


def plan_rows(call: AttentionCall, tile: int) -> Work:
    """The rows' work for tiles of ``tile`` keys, made once for layouts that share their rows' offsets: nothing is read
    back for the next one."""
    layout = call.layout
    plans, copies = kept_with_rows(layout), call.q.shape[0] * call.q.shape[1] // layout.num_groups
    key = ("rows", copies, tile)
    if key not in plans:
        lists = max(1, layout.num_groups * layout.num_q_blocks * copies)
        bound = _part_blocks(layout.nnz_blocks * copies, lists, layout.kv_block_size, tile, layout.device)
        offsets, turn = _rows_cut_last(layout) if offsets_decide_rows(layout) else _row_lists(layout)
        plans[key] = _cut(offsets, turn, bound, max(1, tile // layout.kv_block_size), layout.nnz_blocks)
    found = plans[key]
    assert isinstance(found, Work)
    return found


def plan_columns(call: AttentionCall, tile: int) -> Columns:
    """The columns' work for tiles of ``tile`` queries."""
    plans, layout = kept_with(call.layout), call.layout
    copies = call.q.shape[0] * call.q.shape[1] // layout.num_groups
    with_bias = call.block_bias is not None
    key = ("columns", copies, call.queries_per_kv, tile, with_bias)
    if key not in plans:
        lists = max(1, call.k.shape[0] * call.k.shape[1] * layout.num_kv_blocks)
        bound = _part_blocks(layout.nnz_blocks * copies, lists, layout.q_block_size, tile, layout.device)
        entries, order, edges = _column_lists(layout, call.queries_per_kv)
        longest = layout.num_q_blocks * call.queries_per_kv if layout.transient else None
        work = _cut(edges[::2], edges[1::2], bound, max(1, tile // layout.q_block_size), len(entries), longest)
        groups = max(1, layout.num_groups // call.queries_per_kv)
        plans[key] = Columns(entries, _source(layout, order) if with_bias else None, groups, work)
    found = plans[key]
    assert isinstance(found, Columns)
    return found


def _part_blocks(blocks: int, lists: int, block_size: int, tile: int, device: torch.device) -> int:
    """The most blocks that one program walks, a whole number of tiles, where ``lists`` hold ``blocks`` in all.

    Where there are lists enough for every processor, those up to twice the mean stay whole.
    """
    share = blocks / (SHARES * processors(device))
    whole = 2 * blocks / lists if lists >= ENOUGH * processors(device) else 0
    most = max(share, MIN_PART_TOKENS / block_size, whole)
    step = max(1, tile // block_size)
    return step * max(1, math.ceil(most / step))


def _rows_cut_last(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """As ``_row_lists`` for equal block sizes, whatever the columns are: only a row's last block can be cut, and to
    mask one that is not does no harm."""
    crow = layout.crow_indices
    offsets = torch.cat([crow[:, :-1].reshape(-1), crow[-1:, -1]])
    may_cut = layout.causal or layout.kv_tokens % layout.kv_block_size != 0
    return offsets, torch.maximum(offsets[1:] - 1, offsets[:-1]) if may_cut else offsets[1:]


def _row_lists(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """(R + 1,) offsets of the rows and (R,) the place where each row's masking begins.

    Columns ascend, so what the diagonal or the ragged end cuts lies at the end of a row.
    """
    crow = layout.crow_indices
    offsets = torch.cat([crow[:, :-1].reshape(-1), crow[-1:, -1]])
    ragged = layout.kv_tokens % layout.kv_block_size != 0
    if not layout.causal and not ragged:
        return offsets, offsets[1:]
    cut = layout.crosses_diagonal()
    if ragged:
        cut = cut | (layout.col_indices == layout.num_kv_blocks - 1)
    before = torch.cat([offsets.new_zeros(1), cut.cumsum(0)])
    return offsets, offsets[1:] - (before[offsets[1:]] - before[offsets[:-1]])


@dataclass(frozen=True, eq=False)
class _Places:
    """What of the columns' entries follows from the rows, in storage order, query heads that share a list side by side.

    Args:
        entry: (n,) int32, see ``MEMBER_SHIFT``.
        first: (n,) twice the number of the first column of the entry's KV head; int32 where that holds all columns.
        diagonal: (n,) the key of the block on the diagonal of the entry's row.
        edges: (2 * columns + 1,) the least keys of what the diagonal cuts and of the rest, column after column.
    """

    entry: Tensor
    first: Tensor
    diagonal: Tensor
    edges: Tensor

    @classmethod
    def of(cls, layout: BlockLayout, members: int) -> _Places:
        group, row, _ = layout.coordinates()
        member = group % members
        if layout.num_groups == 1 and members > 1:  # every query head of a KV head has the same list
            member = torch.arange(members, device=layout.device).repeat_interleave(layout.nnz_blocks)
            group, row = group.repeat(members), row.repeat(members)
        columns = max(1, layout.num_groups // members) * layout.num_kv_blocks
        dtype = torch.int32 if 2 * columns < 2**31 else torch.int64
        first = group // members * (2 * layout.num_kv_blocks)
        edges = torch.arange(2 * columns + 1, device=layout.device, dtype=dtype)
        entry = ((member << MEMBER_SHIFT) | row).to(torch.int32)
        return cls(entry, first.to(dtype), (first + 2 * row).to(dtype), edges)


def _column_lists(layout: BlockLayout, members: int) -> tuple[Tensor, Tensor, Tensor]:
    """entries of ``Columns``, their order in ``_Places``, and (2 R + 1,) offsets: of each column first of the blocks
    that the diagonal cuts, then of the others."""
    by_rows = layout.transient and offsets_decide_rows(layout)
    known = kept_with_rows(layout) if by_rows else {}
    key = ("places", members)
    if key not in known:
        known[key] = _Places.of(layout, members)
    places = known[key]
    assert isinstance(places, _Places)
    col = layout.col_indices if layout.num_groups > 1 else layout.col_indices.repeat(members)
    keys = torch.add(places.first, col, alpha=2)
    if not layout.causal:
        keys = keys + 1
    elif by_rows:
        keys = keys + (keys != places.diagonal)
    else:
        keys = keys + ~layout.crosses_diagonal().repeat(members if layout.num_groups == 1 else 1)
    keys, order = torch.sort(keys, stable=True)
    return places.entry.index_select(0, order), order, torch.searchsorted(keys, places.edges)


def _source(layout: BlockLayout, order: Tensor) -> Tensor:
    """(n,) int32: the places in the layout of entries in this order."""
    return (order if len(order) == layout.nnz_blocks else order % layout.nnz_blocks).to(torch.int32)


def _cut(offsets: Tensor, turn: Tensor, bound: int, step: int, entries: int, longest: int | None = None) -> Work:
    """Items of at most ``bound`` blocks (a multiple of ``step``) from lists at ``offsets``, the longest first.

    Args:
        entries: how many blocks the lists hold.
        longest: what no list is longer than. Given, nothing is read back: there are then as many items, splits and
            parts as such lists can need, and those that these lists do not need are left empty.
    """
    from raybsa.kernels.triton_items import write_items

    splittable = longest is None or longest > bound
    whole, split = (entries // bound, entries // (bound + 1)) if splittable else (0, 0)
    items = offsets.new_zeros(len(turn) + whole, 8, dtype=torch.int32)
    splits = offsets.new_zeros(split, 4, dtype=torch.int32)
    totals = offsets.new_empty(3, dtype=torch.int32)
    write_items(offsets, turn, items, splits, totals, bound, step)
    if longest is not None:
        return Work(items, splits, whole + split)
    made, lists, parts = totals.tolist()
    return Work(items[:made].clone(), splits[:lists].clone(), parts)
