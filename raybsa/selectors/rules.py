"""Rules: which blocks a row may keep, which it must, and how many. None of it looks at the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.axis import check_geometry
from raybsa.patterns.budgets import even
from raybsa.patterns.dilated import Dilated
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import check_density

MAX_FORCED = 2048  # sinks and window: so many ranks are told apart in float32 below the largest number
_FORCED = 3.0e38
_HIDDEN = -3.0e38  # above what may not be kept, below any score


@dataclass(frozen=True)
class Rules:
    """Which blocks may and must be kept. Rows and columns are blocks of one size, by their global numbers.

    A *candidate* shares a segment with the row, at a distance in blocks that is a multiple of the segment's dilation
    rate (any pair of the two lists, as the pattern ``dilated``); without lists every allowed block is one. *Forced* are
    the candidates on the diagonal, then among the first ``sinks``, then nearer than ``window``: in this order where a
    row's number of blocks does not hold them all.

    Args:
        block_size: tokens, a power of two.
        causal: a row may keep only blocks up to its own.
        segments: (segment length in tokens, dilation rate in blocks) pairs; None: everything.
        sinks: blocks at the start.
        window: blocks up to this distance, the own one included; 1 is the diagonal alone.
        max_blocks: the most that a row keeps, whatever the density; bounds work and memory to O(N).

    Raises:
        ValueError: a number out of range.
    """

    block_size: int
    causal: bool
    segments: tuple[tuple[int, int], ...] | None = None
    sinks: int = 0
    window: int = 1
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        check_geometry(1, 1, self.block_size, self.block_size)
        integer("sinks", self.sinks, least=0)
        integer("window", self.window)
        if self.max_blocks is not None:
            integer("max_blocks", self.max_blocks)
        if self.sinks + 2 * self.window > MAX_FORCED:
            raise ValueError(f"sinks + 2 * window must be at most {MAX_FORCED} blocks, got {self.sinks}, {self.window}")

    def diagonal(self, rows: Tensor, columns: int) -> Tensor:
        """The own block of each row, the last one where its tokens lie beyond the keys."""
        return rows.clamp(max=columns - 1)

    def candidates(self, rows: Tensor, columns: int) -> Tensor:
        """(R, columns) bool for rows (R,)."""
        i, j = rows[:, None], torch.arange(columns, device=rows.device)
        found = torch.ones(len(rows), columns, dtype=torch.bool, device=rows.device)
        if self.segments is not None:
            found = (j == self.diagonal(rows, columns)[:, None]) | self._in_segments(i, j)
        return found & (j <= i) if self.causal else found

    def forced_rank(self, row: Tensor, col: Tensor, columns: int) -> Tensor:
        """How urgent a block is, 0 for the diagonal; -1 where it is not forced. ``row`` and ``col`` broadcast."""
        diagonal = self.diagonal(row, columns)
        distance = (col - diagonal).abs()
        rank = torch.where(distance < self.window, 1 + self.sinks + 2 * distance + (col > diagonal), -1)
        rank = torch.where(col < self.sinks, 1 + col, rank)
        return torch.where(distance == 0, 0, rank)

    def settled(self, row: Tensor, col: Tensor, columns: int) -> Tensor:
        """Whether a block leaves the row no choice: it is forced, or causality forbids it. ``row`` and ``col``
        broadcast; blocks outside of the segments are not told apart."""
        diagonal = self.diagonal(row, columns)
        near = col > diagonal - self.window if self.causal else (col - diagonal).abs() < self.window
        return near | (col < self.sinks) if self.sinks else near

    def preferences(self, scores: Tensor, rows: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Scores (..., R, columns) with what must be kept above all and what may not be at -inf.

        ``hidden`` (bool, broadcasts to the same) comes last of what may be kept, forced or not.
        """
        columns = scores.shape[-1]
        rank = self.forced_rank(rows[:, None], torch.arange(columns, device=rows.device), columns)
        urgent = _FORCED * (1.0 - rank.float() / (2 * MAX_FORCED))
        wanted = torch.where(rank >= 0, urgent, scores.float())
        if hidden is not None:
            wanted = wanted.masked_fill(hidden, _HIDDEN)
        return wanted.masked_fill(~self.candidates(rows, columns), float("-inf"))

    def allowed(self, rows: Tensor, columns: int) -> Tensor:
        """(R,) int64: blocks that causality lets each row see."""
        return self.diagonal(rows, columns) + 1 if self.causal else torch.full_like(rows, columns)

    def budget(self, rows: Tensor, num_rows: int, columns: int, density: float) -> Tensor:
        """(R,) int64 of ``rows`` among ``num_rows``: the same in all rows, of which the last, which have most to
        choose from, have one more, so that the density is exact in total; but at least one, and no more than candidates
        or ``max_blocks``."""
        check_density(density)
        every = torch.arange(num_rows, device=rows.device)
        total = round(density * int(self.allowed(every, columns).sum()))
        return even(torch.ones_like(every), self._most(every, columns), total, last_first=True)[rows]

    def _most(self, rows: Tensor, columns: int) -> Tensor:
        """(R,) int64: the most that each row can keep."""
        if self.segments is None:
            found = self.allowed(rows, columns)
        else:
            found = torch.cat([self.candidates(r, columns).sum(1) for r in rows.split(max(1, 2**22 // columns))])
        return found if self.max_blocks is None else found.clamp(max=self.max_blocks)

    def _in_segments(self, i: Tensor, j: Tensor) -> Tensor:
        """(R, columns): the natural blocks of the pattern ``dilated``."""
        assert self.segments is not None
        found = torch.zeros(len(i), len(j), dtype=torch.bool, device=j.device)
        for length, rate in self.segments:
            low = i * self.block_size // length * length // self.block_size
            last = (i + 1) * self.block_size - 1
            high = ((last // length + 1) * length - 1) // self.block_size
            found |= (j >= low) & (j <= high) & ((j - i) % rate == 0)
        return found


def segment_pairs(
    segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None
) -> tuple[tuple[int, int], ...] | None:
    """The ``segments`` of ``Rules`` from two lists of equal length, checked as the pattern ``dilated`` checks them."""
    lists = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    given = [name for name, value in lists.items() if value is not None]
    if len(given) == 1:
        raise ValueError(f"segment_lengths and dilation_rates go together, got only {given[0]}")
    if segment_lengths is None or dilation_rates is None:
        return None
    rule = Dilated(tuple(segment_lengths), tuple(dilation_rates))
    return tuple(zip(rule.segment_lengths, rule.dilation_rates, strict=True))
