"""Sliding window: every token sees the tokens near it. Longformer, Beltagy et al. 2020, arXiv:2004.05150."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from raybsa.patterns.budgets import fit
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, nearest


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """Query token i sees key token j iff ``|i - j| < window`` (both sides; a causal layout keeps the past).

    A density sets the window. What whole blocks leave of it goes to evenly spread rows, one block more each. Without
    causality all rows keep the same number: where the sequence ends on one side the window goes on on the other.

    Args:
        window: tokens, the own one included.
    """

    window: int = 512
    family: ClassVar[str] = "sliding_window"
    free: ClassVar[tuple[str, ...]] = ("window",)

    def __post_init__(self) -> None:
        integer("window", self.window)

    @property
    def size(self) -> str:
        return f"window of {self.window:,} tokens"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return window_blocks(grid, self.window)

    def at(self, grid: Grid, total: int) -> SlidingWindow:
        reach = fit(lambda reach: near_counts(grid, reach), 0, grid.num_kv_blocks, total)
        return replace(self, window=max(1, reach * grid.kv_block_size))

    def own(self, grid: Grid) -> Tensor:
        return grid.allowed  # rows are even

    def order(self, slots: Slots) -> Tensor:
        return nearest(slots)


def near_counts(grid: Grid, reach: int) -> Tensor:
    """(num_rows,) int64: columns of the diagonal and up to ``reach`` blocks beside it."""
    return grid.width + grid.first.clamp(max=reach) + (grid.allowed - 1 - grid.last).clamp(max=reach)


def window_blocks(grid: Grid, window: int) -> tuple[Tensor, Tensor]:
    """(n,) rows and columns with a pair of tokens less than ``window`` apart."""
    return grid.token_runs(grid.first_token - window + 1, grid.last_token + window - 1)
