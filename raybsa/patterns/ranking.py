"""From a family's order of preference to an exact number of distinct columns a row, in O(n) for n columns kept.

A family answers one question, vectorised: *which column is this row's choice number ``rank``?* It may answer -1 (none),
a column that causality forbids, one it has named before, or several columns in turn. The driver here puts the diagonal
first, drops what does not count, adds the nearest columns to rows left short, and stops at each row's budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid, ragged


@dataclass(frozen=True, eq=False)
class Slots:
    """The questions to a family's order: (n,) rows and ranks, and what is known of those rows.

    Args:
        grid: the geometry.
        budget: (num_rows,) int64, columns that each row keeps in the end.
        row: (n,) int64.
        rank: (n,) int64, 0 for the first choice after the diagonal.
    """

    grid: Grid
    budget: Tensor
    row: Tensor
    rank: Tensor

    @cached_property
    def first(self) -> Tensor:
        return self.grid.first[self.row]

    @cached_property
    def last(self) -> Tensor:
        return self.grid.last[self.row]

    @cached_property
    def width(self) -> Tensor:
        return self.grid.width[self.row]

    @cached_property
    def allowed(self) -> Tensor:
        return self.grid.allowed[self.row]


Order = Callable[[Slots], Tensor]
"""(n,) slots -> (n,) or (n, choices) int64 columns, -1 for none; the choices of one rank are taken in turn."""


def ranked(grid: Grid, budget: Tensor, order: Order) -> Tensor:
    """(budget.sum(),) int64 columns row after row; each row's in order of preference, ``budget`` distinct ones."""
    row, place = ragged(grid.width + budget)
    width = grid.width[row]
    choices = order(Slots(grid, budget, row, (place - width).clamp(min=0))).reshape(len(row), -1)
    diagonal = torch.full_like(choices, -1)
    diagonal[:, 0] = grid.first[row] + place
    choices = torch.where((place < width)[:, None], diagonal, choices)
    row, col = row.repeat_interleave(choices.shape[1]), choices.reshape(-1)
    seen = (col >= 0) & (col < grid.allowed[row])
    row, col = _distinct(grid, budget, row[seen], col[seen])
    short = torch.bincount(row, minlength=grid.num_rows) < budget
    return _fill(grid, budget, row, col, short) if bool(short.any()) else col


def ranked_without_repeats(grid: Grid, budget: Tensor, order: Order) -> Tensor:
    """``ranked`` for an order of one choice a rank that names every allowed column off the diagonal once."""
    row, place = ragged(budget)
    width = grid.width[row]
    choices = order(Slots(grid, budget, row, (place - width).clamp(min=0)))
    return torch.where(place < width, grid.first[row] + place, choices)


def nearest(slots: Slots) -> Tensor:
    """(n,): the allowed columns by distance from the diagonal, left before right; -1 past the last."""
    return outward(slots.first, slots.last, torch.zeros_like(slots.row), slots.allowed - 1, slots.rank)


def outward(first: Tensor, last: Tensor, low: Tensor, high: Tensor, rank: Tensor, step: Tensor | int = 1) -> Tensor:
    """(n,): column number ``rank`` on the way out from ``first .. last`` within ``low .. high``, by ``step``.

    Left and right in turn until one side ends, then the other; -1 before the first and past the last.
    """
    left, right = ((first - low) // step).clamp(min=0), ((high - last) // step).clamp(min=0)
    both = torch.minimum(left, right)
    paired = rank < 2 * both
    stride = step * (1 + torch.where(paired, rank // 2, rank - both))
    to_left = torch.where(paired, rank % 2 == 0, left > right)
    col = torch.where(to_left, first - stride, last + stride)
    return torch.where((rank >= 0) & (rank < left + right), col, -1)


def evenly(low: Tensor, high: Tensor, hole: tuple[Tensor, Tensor], rank: Tensor, wanted: Tensor) -> Tensor:
    """(n,): column number ``rank`` of ``wanted`` ones, evenly spread over ``low .. high`` but for a hole inside it.

    The hole runs from its first to its last column. All the columns where there are not as many as wanted; -1 before
    the first and past the last.
    """
    width = hole[1] - hole[0] + 1
    free = high - low + 1 - width
    wanted = torch.minimum(wanted, free)
    col = low + rank * free // wanted.clamp(min=1)
    return torch.where((rank >= 0) & (rank < wanted), torch.where(col < hole[0], col, col + width), -1)


def skip_diagonal(slots: Slots, col: Tensor) -> Tensor:
    """(n,): columns numbered without the diagonal, as true columns."""
    return torch.where(col < slots.first, col, col + slots.width)


def among(slots: Slots, row: Tensor, col: Tensor) -> Tensor:
    """(n,): the listed blocks of each row by distance from the diagonal; -1 past the last."""
    grid = slots.grid
    gap = torch.maximum(grid.first[row] - col, col - grid.last[row]).clamp(min=0, max=grid.num_kv_blocks)
    order = torch.argsort(row * (grid.num_kv_blocks + 1) + gap, stable=True)
    counts = torch.bincount(row, minlength=grid.num_rows)
    return listed(slots, counts, col[order])


def listed(slots: Slots, counts: Tensor, col: Tensor) -> Tensor:
    """(n,): choice number ``rank`` of a row's list; ``counts`` (num_rows,) entries a row, ``col`` row after row."""
    begin = counts.cumsum(0) - counts
    index = torch.where(slots.rank < counts[slots.row], begin[slots.row] + slots.rank, len(col))
    return torch.cat([col, col.new_full((1,), -1)])[index]


def _distinct(grid: Grid, budget: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Of blocks listed row after row in order of preference: the first ``budget`` distinct ones of each row."""
    key, position = torch.sort(row * grid.num_kv_blocks + col, stable=True)
    repeated = torch.zeros_like(key, dtype=torch.bool)
    repeated[1:] = key[1:] == key[:-1]
    fresh = torch.empty_like(repeated)
    fresh[position] = ~repeated
    row, col = row[fresh], col[fresh]
    counts = torch.bincount(row, minlength=grid.num_rows)
    rank = torch.arange(len(row), device=grid.device) - (counts.cumsum(0) - counts)[row]
    kept = rank < budget[row]
    return row[kept], col[kept]


def _fill(grid: Grid, budget: Tensor, row: Tensor, col: Tensor, short: Tensor) -> Tensor:
    """The columns with the nearest ones added to the short rows."""
    more, rank = ragged(torch.where(short, budget, 0))
    row, col = torch.cat([row, more]), torch.cat([col, nearest(Slots(grid, budget, more, rank))])
    order = torch.argsort(row, stable=True)
    order = order[col[order] >= 0]
    return _distinct(grid, budget, row[order], col[order])[1]
