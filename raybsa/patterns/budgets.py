"""How many columns each row keeps at a density: one head's total, shared out among its rows.

All of it is counted on the CPU, for one head: a few numbers a row, whatever the device of the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid


def share_out(grid: Grid, total: int, least: Tensor, own: Tensor) -> Tensor:
    """(num_q_blocks,) int64 that sum to ``total``: a causal row keeps its ``own`` blocks.

    Where the total holds more than all these, rows get equally many more, as far as they see any; where it holds less,
    the longest rows are cut to one length. Without causality all rows keep the same number. Odd blocks are spread
    evenly over the rows.

    Args:
        grid: of one head.
        total: blocks of the head, at least ``least.sum()``.
        least: (num_q_blocks,) int64, what a row keeps in any case.
        own: (num_q_blocks,) int64, at least ``least``: the blocks of the family's shape.
    """
    if not grid.causal:
        return even(least, grid.allowed, total)
    return even(least, own, total) if total < int(own.sum()) else level(own, grid.allowed, total)


def global_budget(grid: Grid, total: int, most_globals: int) -> Tensor:
    """(num_q_blocks,) int64 for rules with global blocks, that sum to ``total``.

    As many whole globals (a KV block that every row sees, and its own rows that see everything) as fit beside the
    diagonal, ``most_globals`` at most. What is left goes to all rows alike: into the next global's column and then its
    rows, or where there is no next global, one more column in every row that is not yet full.
    """
    most_globals = min(most_globals, grid.num_kv_blocks)
    kept = whole_globals(grid, total, most_globals)
    lower = with_globals(grid, kept)
    return level(lower, grid.allowed if kept == most_globals else with_globals(grid, kept + 1), total)


def whole_globals(grid: Grid, total: int, most_globals: int) -> int:
    """How many globals, ``most_globals`` at most, fit into ``total`` blocks beside the diagonal."""
    return fit(lambda count: with_globals(grid, count), 0, min(most_globals, grid.num_kv_blocks), total)


def global_rows(grid: Grid, num_globals: int) -> Tensor:
    """(num_rows,) bool: rows with a token in one of the first ``num_globals`` KV blocks."""
    return grid.first_unit < num_globals


def with_globals(grid: Grid, num_globals: int) -> Tensor:
    """(num_rows,) int64: columns of each row that keeps its diagonal and ``num_globals`` globals."""
    before = grid.first.clamp(max=num_globals)
    after = (grid.allowed.clamp(max=num_globals) - grid.last - 1).clamp(min=0)
    return torch.where(global_rows(grid, num_globals), grid.allowed, grid.width + before + after)


def even(lower: Tensor, upper: Tensor, total: int, *, last_first: bool = False) -> Tensor:
    """Counts between ``lower`` and ``upper`` (n,) int64 that sum to ``total``, or as near as these let them: one height
    for all, and one more in evenly spread ones of those below ``upper``, or in the last of them."""
    pick = last if last_first else spread
    return _filled(lambda height: lower.clamp(min=height).minimum(upper), upper, total, pick)


def level(lower: Tensor, upper: Tensor, total: int) -> Tensor:
    """As ``even``, by equal steps up from ``lower``."""
    return _filled(lambda step: (lower + step).minimum(upper), upper, total, spread)


def _filled(
    counts: Callable[[int], Tensor], upper: Tensor, total: int, pick: Callable[[Tensor, int], Tensor]
) -> Tensor:
    height = fit(counts, 0, int(upper.max()), total)
    found = counts(height)
    room = counts(height + 1) > found
    odd = min(total - int(found.sum()), int(room.sum()))
    return found + pick(room, odd) if odd > 0 else found


def spread(places: Tensor, count: int) -> Tensor:
    """(n,) bool: ``count`` of the ``places`` (n,) bool, evenly spread over them."""
    number = places.cumsum(0)
    size = max(1, int(places.sum()))
    return places & (number * count // size > (number - 1) * count // size)


def last(places: Tensor, count: int) -> Tensor:
    """(n,) bool: the last ``count`` of the ``places`` (n,) bool."""
    number = places.cumsum(0)
    return places & (number > number[-1] - count)


def fit(counts: Callable[[int], Tensor], low: int, high: int, total: int) -> int:
    """The largest value in low..high whose counts sum to at most ``total``; ``low`` where none does. Sums ascend."""
    while low < high:
        middle = (low + high + 1) // 2
        if int(counts(middle).sum()) <= total:
            low = middle
        else:
            high = middle - 1
    return low
