"""How many columns each row keeps at a density."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid


def row_budget(grid: Grid, density: float) -> Tensor:
    """(num_rows,) int64: ``max(1, round(density * allowed))`` in every row."""
    return (density * grid.allowed.double()).round().clamp(min=1).long()


def global_budget(grid: Grid, density: float, most_globals: int) -> Tensor:
    """(num_rows,) int64 for rules with global blocks: each head's total is ``max(rows, round(density * allowed))``.

    As many whole globals (a KV block that every row sees, and its own rows that see everything) as fit beside the
    diagonal, ``most_globals`` at most. What is left goes to all rows alike: into the next global's column and then its
    rows, or where there is no next global, one more column in every row that is not yet full.
    """
    rows = slice(0, grid.num_q_blocks)
    allowed, width = grid.allowed[rows], grid.width[rows]
    total = max(grid.num_q_blocks, round(density * int(allowed.sum())))
    most_globals = min(most_globals, grid.num_kv_blocks)
    kept = _last_that_fits(lambda count: _with_globals(grid, count), most_globals, total)
    if kept < 0:
        lower, upper = torch.ones_like(width), width
    elif kept < most_globals:
        lower, upper = _with_globals(grid, kept), _with_globals(grid, kept + 1)
    else:
        lower, upper = _with_globals(grid, kept), allowed
    return level(lower, upper, total).repeat(len(grid.heads))


def global_rows(grid: Grid, num_globals: int) -> Tensor:
    """(num_rows,) bool: rows with a token in one of the first ``num_globals`` KV blocks."""
    return grid.first_unit < num_globals


def _with_globals(grid: Grid, num_globals: int) -> Tensor:
    """(num_q_blocks,) int64: columns of each row that keeps its diagonal and ``num_globals`` globals."""
    rows = slice(0, grid.num_q_blocks)
    first, last, allowed = grid.first[rows], grid.last[rows], grid.allowed[rows]
    before, after = first.clamp(max=num_globals), (allowed.clamp(max=num_globals) - last - 1).clamp(min=0)
    return torch.where(global_rows(grid, num_globals)[rows], allowed, grid.width[rows] + before + after)


def level(lower: Tensor, upper: Tensor, total: int) -> Tensor:
    """Counts between ``lower`` and ``upper`` (n,) int64 that sum to ``total``, or as near as these let them: equal
    steps, the odd ones to the first rows."""
    most = int((upper - lower).max())
    height = max(0, _last_that_fits(lambda step: torch.minimum(upper, lower + step), most, total))
    counts = torch.minimum(upper, lower + height)
    room = counts < upper
    return counts + (room & (room.cumsum(0) <= total - counts.sum()))


def _last_that_fits(counts: Callable[[int], Tensor], most: int, total: int) -> int:
    """The largest value in 0..most whose counts sum to at most ``total``; -1 where none does. The sums ascend."""
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        if int(counts(middle).sum()) <= total:
            low = middle
        else:
            high = middle - 1
    return low
