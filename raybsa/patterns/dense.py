"""Dense: every allowed block; the baseline of every comparison. Vaswani et al. 2017, arXiv:1706.03762."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, evenly


@dataclass(frozen=True)
class Dense(Pattern):
    """Every token sees every token. A density sets how many evenly spread blocks of all that it may see a row keeps:
    the same number in all rows, as far as they see so many, and one more in evenly spread ones."""

    family: ClassVar[str] = "dense"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return grid.runs(grid.rows, torch.zeros_like(grid.rows), grid.allowed - 1)

    def own(self, grid: Grid) -> Tensor:
        return grid.allowed

    def order(self, slots: Slots) -> Tensor:
        free = slots.budget[slots.row] - slots.width
        hole = (slots.first, slots.last)
        return evenly(torch.zeros_like(slots.row), slots.allowed - 1, hole, slots.rank, free)
