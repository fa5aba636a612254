"""Sliding window: every token sees the tokens near it. Longformer, Beltagy et al. 2020, arXiv:2004.05150."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, nearest


@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """Query token i sees key token j iff ``|i - j| < window`` (both sides; a causal layout keeps the past).

    Under a density the window is as wide as the budget; where the sequence ends on one side it goes on on the other.

    Args:
        window: tokens, the own one included.
    """

    window: int = 512
    family: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        integer("window", self.window)

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return window_blocks(grid, self.window)

    def order(self, slots: Slots) -> Tensor:
        return nearest(slots)


def window_blocks(grid: Grid, window: int) -> tuple[Tensor, Tensor]:
    """(n,) rows and columns with a pair of tokens less than ``window`` apart."""
    return grid.token_runs(grid.first_token - window + 1, grid.last_token + window - 1)
