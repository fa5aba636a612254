"""Sink and window: the first tokens and the near ones. StreamingLLM, Xiao et al. 2023, arXiv:2309.17453."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, outward
from raybsa.patterns.sliding_window import window_blocks


@dataclass(frozen=True)
class SinkWindow(Pattern):
    """Query token i sees key token j iff ``j < sink`` or ``|i - j| < window``.

    Under a density the sinks stay and the window is as wide as the rest of the budget.

    Args:
        sink: tokens at the start of the sequence that every token sees.
        window: tokens, the own one included.
    """

    sink: int = 64
    window: int = 512
    family: ClassVar[str] = "sink_window"

    def __post_init__(self) -> None:
        integer("sink", self.sink)
        integer("window", self.window)

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        sinks = grid.runs(grid.rows, torch.zeros_like(grid.rows), torch.full_like(grid.rows, self._sinks(grid) - 1))
        window = window_blocks(grid, self.window)
        return torch.cat([sinks[0], window[0]]), torch.cat([sinks[1], window[1]])

    def order(self, slots: Slots) -> Tensor:
        sinks = self._sinks(slots.grid)
        low = slots.first.clamp(max=sinks)
        window = outward(slots.first, slots.last, low, slots.allowed - 1, slots.rank - sinks)
        return torch.where(slots.rank < sinks, slots.rank, window)

    def _sinks(self, grid: Grid) -> int:
        return -(-min(self.sink, grid.kv_len) // grid.kv_block_size)
