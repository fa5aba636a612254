"""What segments say of blocks: over which tokens a block is pooled, and which pairs of blocks may judge one another.

A block is pooled over the tokens of one segment, so that it says something to tokens of that segment alone. A query
block whose tokens are all of one segment is *uniform*: only such a row judges, and only blocks that are pooled over its
segment. Pairs of blocks are compared a tile of rows at a time, by a few numbers a block: memory is O(n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST, _MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class BlockSegments:
    """The blocks of one side, (B, n) each.

    Args:
        segment: int64 the segment over whose tokens the block is pooled.
        pooled: bool whether there is such a token.
        low, high: int64 the least and the largest segment of the tokens that count; low > high where none does.
    """

    segment: Tensor
    pooled: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, ids: Tensor, may_pool: Tensor, counts: Tensor, block_size: int, *, last: bool) -> BlockSegments:
        """The blocks of tokens with these ids.

        Args:
            ids: (B, S) int64.
            may_pool: (B, S) bool tokens over which a block may be pooled.
            counts: (B, S) bool tokens whose segments ``low`` and ``high`` tell.
            last: a block is pooled over the segment of its last such token, else of its first. Under causality the
                segments that begin in a block are those whose later rows look at it.
        """
        blocks, may_pool, counts = (as_blocks(x, block_size) for x in (ids, may_pool, counts))
        at = torch.arange(block_size, device=ids.device)
        at = torch.where(may_pool, at if last else -at, -block_size).amax(2, keepdim=True)
        segment = blocks.gather(2, (at if last else -at).clamp(0, block_size - 1))[..., 0]
        low, high = (torch.where(counts, blocks, fill) for fill in (_MOST, _LEAST))
        return cls(segment, may_pool.any(2), low.amin(2), high.amax(2))

    def holds(self, ids: Tensor, block_size: int) -> Tensor:
        """(B, S) bool: tokens that are of their block's ``segment``."""
        return ids == self.segment.repeat_interleave(block_size, 1)[:, : ids.shape[1]]

    def is_before(self, wanted: Tensor) -> Tensor:
        """(B, n) bool: whether the block before each is pooled over the segment ``wanted`` (B, n)."""
        return F.pad(self.pooled[:, :-1] & (self.segment[:, :-1] == wanted[:, 1:]), (1, 0))


@dataclass(frozen=True, eq=False)
class SegmentPairs:
    """Query blocks ``rows`` (B, R) against KV blocks ``columns`` (B, C)."""

    rows: BlockSegments
    columns: BlockSegments

    def tile(self, place: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, r, C) bool each, of the rows at ``place``: pairs that may judge by content; pairs of which no token
        sees another, as far as the ranges of their segments tell."""
        rows = BlockSegments(*(x[:, None, place, None] for x in _parts(self.rows)))
        return _compare(rows, BlockSegments(*(x[:, None, None] for x in _parts(self.columns))))

    def at(self, sample: Tensor, place: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The same of single pairs; the three broadcast."""
        rows = BlockSegments(*(x[sample, place] for x in _parts(self.rows)))
        return _compare(rows, BlockSegments(*(x[sample, column] for x in _parts(self.columns))))

    def as_tokens(self) -> tuple[Tensor, Tensor]:
        """``segment_ids`` (B, R) and (B, C) for an attention among blocks: equal where a pair judges by content."""
        rows, columns = self.rows, self.columns
        known = torch.where(columns.pooled, columns.segment, _MOST).sort(1).values
        of_rows, of_columns = torch.searchsorted(known, rows.low), torch.searchsorted(known, columns.segment)
        judges = (rows.low == rows.high) & (known.gather(1, of_rows.clamp(max=known.shape[1] - 1)) == rows.low)
        return torch.where(judges, of_rows, -1), torch.where(columns.pooled, of_columns, -2)


def as_blocks(x: Tensor, block_size: int) -> Tensor:
    """(..., n, block_size) of (..., S), the ragged last block filled with 0."""
    return F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def _parts(side: BlockSegments) -> tuple[Tensor, ...]:
    return side.segment, side.pooled, side.low, side.high


def _compare(rows: BlockSegments, columns: BlockSegments) -> tuple[Tensor, Tensor]:
    judged = (rows.low == rows.high) & columns.pooled & (columns.segment == rows.low)
    return judged, (columns.low > rows.high) | (columns.high < rows.low)
