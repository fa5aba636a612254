"""Sink and window: the first tokens and the near ones. StreamingLLM, Xiao et al. 2023, arXiv:2309.17453."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.budgets import fit
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, outward
from raybsa.patterns.sliding_window import window_blocks


@dataclass(frozen=True)
class SinkWindow(Pattern):
    """Query token i sees key token j iff ``j < sink`` or ``|i - j| < window``.

    A density sets the window; the sinks stay. What whole blocks leave of it goes to evenly spread rows, one block more
    each. Without causality all rows keep the same number, as in ``sliding_window``.

    Args:
        sink: tokens at the start of the sequence that every token sees.
        window: tokens, the own one included.
    """

    sink: int = 64
    window: int = 512
    family: ClassVar[str] = "sink_window"
    free: ClassVar[tuple[str, ...]] = ("window",)

    def __post_init__(self) -> None:
        integer("sink", self.sink)
        integer("window", self.window)

    @property
    def size(self) -> str:
        return f"window of {self.window:,} tokens"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        sinks = grid.runs(grid.rows, torch.zeros_like(grid.rows), torch.full_like(grid.rows, self._sinks(grid) - 1))
        window = window_blocks(grid, self.window)
        return torch.cat([sinks[0], window[0]]), torch.cat([sinks[1], window[1]])

    def at(self, grid: Grid, total: int) -> SinkWindow:
        reach = fit(lambda reach: self._counts(grid, reach), 0, grid.num_kv_blocks, total)
        return replace(self, window=max(1, reach * grid.kv_block_size))

    def least(self, grid: Grid) -> Tensor:
        return self._counts(grid, 0)

    def own(self, grid: Grid) -> Tensor:
        return grid.allowed  # rows are even

    def order(self, slots: Slots) -> Tensor:
        sinks = self._sinks(slots.grid)
        low = slots.first.clamp(max=sinks)
        window = outward(slots.first, slots.last, low, slots.allowed - 1, slots.rank - sinks)
        return torch.where(slots.rank < sinks, slots.rank, window)

    def _counts(self, grid: Grid, reach: int) -> Tensor:
        """(num_rows,) int64: columns of the sinks and of a window of so many blocks to each side."""
        sinks = torch.minimum(grid.allowed, torch.full_like(grid.rows, self._sinks(grid)))
        begin, end = (grid.first - reach).clamp(min=0), torch.minimum(grid.last + reach + 1, grid.allowed)
        return end - begin + torch.minimum(begin, sinks) + (sinks - end).clamp(min=0)

    def _sinks(self, grid: Grid) -> int:
        return -(-min(self.sink, grid.kv_len) // grid.kv_block_size)
