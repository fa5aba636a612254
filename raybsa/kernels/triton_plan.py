"""The work plan of the Triton kernels: which program walks which part of which list of blocks.

Rows (lists of KV blocks) serve the forward and dQ, columns (lists of query blocks) serve dK/dV. A list longer than a
fair share of the whole work is split into parts that a second kernel adds up in a fixed order, so that one global row
or column does not hold up the launch. The longest items come first; all short ones stay in storage order, a head after
the other, so that what runs at one time reads the same keys and values. A plan is made once for a layout, on its
device, with O(nnz) tensor operations and one read back of three numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall, kept_with, kept_with_rows, offsets_decide_rows
from raybsa.kernels.triton_setup import processors
from raybsa.layout import BlockLayout

MIN_PART_TOKENS = 1024  # no list shorter than this is split
SHARES = 2  # a part is at most half of one processor's share of the work: shorter ones take memory and time to add up
ENOUGH = 2  # where there are so many lists a processor, those up to twice the mean stay whole
LENGTHS = 4  # items count as equally long within this fraction of the bound, and then keep their order
MEMBER_SHIFT = 22  # an entry of a column is ``(query head within its KV head << 22) | query block``
MAX_BLOCKS, MAX_MEMBERS = 2**MEMBER_SHIFT, 2 ** (31 - MEMBER_SHIFT)


@dataclass(frozen=True, eq=False)
class Work:
    """Items of work, one a program.

    Args:
        items: (n, 8) int32, the longest first: list, begin, turn, end, part, and three unused. ``begin .. end`` are
            places among all blocks; masking begins at ``turn`` in a row and ends there in a column; ``part`` is -1
            where the item is its whole list. An empty list has an item too, which writes its zeros.
        splits: (m, 4) int32: list, first part, number of parts, one unused.
        parts: how many parts there are.
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
        plans[key] = _cut(offsets, turn, bound, max(1, tile // layout.kv_block_size))
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
        entries, source, offsets, turn = _column_lists(layout, call.queries_per_kv)
        work = _cut(offsets, turn, bound, max(1, tile // layout.q_block_size))
        groups = max(1, layout.num_groups // call.queries_per_kv)
        plans[key] = Columns(entries, source.to(torch.int32) if with_bias else None, groups, work)
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


def _column_lists(layout: BlockLayout, members: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entries and source of ``Columns``, (R + 1,) offsets of the columns, (R,) where each column's masking ends."""
    group, row, col = layout.coordinates()
    cut, source = layout.crosses_diagonal(), torch.arange(layout.nnz_blocks, device=layout.device)
    member = group % members
    if layout.num_groups == 1 and members > 1:  # every query head of a KV head has the same list
        member = torch.arange(members, device=layout.device).repeat_interleave(layout.nnz_blocks)
        group, row, col, cut, source = (x.repeat(members) for x in (group, row, col, cut, source))
    lists = max(1, layout.num_groups // members) * layout.num_kv_blocks
    key = (group // members * layout.num_kv_blocks + col) * 2 + (~cut).long()
    key, order = torch.sort(key.to(torch.int32) if 2 * lists < 2**31 else key, stable=True)
    starts = 2 * torch.arange(lists + 1, device=layout.device, dtype=key.dtype)
    offsets, turn = torch.searchsorted(key, starts), torch.searchsorted(key, starts[:-1] + 1)
    return ((member << MEMBER_SHIFT) | row)[order].to(torch.int32), source[order], offsets, turn


def _cut(offsets: Tensor, turn: Tensor, bound: int, step: int) -> Work:
    """Items of at most ``bound`` blocks (a multiple of ``step``) from lists at ``offsets``, the longest first."""
    counts = offsets.diff()
    pieces = (-(-counts // bound)).clamp(min=1)
    is_split = pieces > 1
    size = -(-counts // (pieces * step)) * step
    parts_of = torch.where(is_split, pieces, 0)
    total, parts, splits = torch.stack([pieces.sum(), parts_of.sum(), is_split.sum()]).tolist()
    lists = torch.arange(len(counts), device=counts.device)
    of = torch.repeat_interleave(lists, pieces, output_size=total)
    piece = torch.arange(total, device=counts.device) - (pieces.cumsum(0) - pieces)[of]
    last = offsets[1:][of]
    begin = torch.minimum(offsets[:-1][of] + piece * size[of], last)
    end = torch.minimum(begin + size[of], last)
    first_part = parts_of.cumsum(0) - parts_of
    part = torch.where(is_split[of], first_part[of] + piece, -1)
    fields = [of, begin, torch.minimum(torch.maximum(turn[of], begin), end), end, part]
    fields += [torch.zeros_like(of)] * 3
    longest_first = torch.argsort((end - begin) * LENGTHS // bound, descending=True, stable=True)
    where = torch.argsort(is_split, descending=True, stable=True)[:splits]
    split = torch.stack([where, first_part[where], pieces[where], torch.zeros_like(where)], 1)
    return Work(torch.stack(fields, 1)[longest_first].to(torch.int32), split.to(torch.int32), parts)
