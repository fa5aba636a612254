"""Fixed: the own span and the last blocks of every span. Sparse Transformer, Child et al. 2019, arXiv:1904.10509."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, outward


@dataclass(frozen=True)
class Fixed(Pattern):
    """Tokens see one another iff their KV blocks lie in one span or the key's is one of the last ``summary`` of a span.

    Under a density the span becomes its multiple nearest to ``2 * summary / density``, so that summaries take half of
    the budget. Summaries (the last column of each span, backwards, then the last but one, ...) and the own
    span's blocks (nearest first) take turns.

    Args:
        span: blocks.
        summary: blocks at the end of each span.
    """

    span: int = 8
    summary: int = 1
    family: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        integer("span", self.span)
        if integer("summary", self.summary) > self.span:
            raise ValueError(f"summary must be at most span = {self.span} blocks, got {self.summary}")

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        row, unit = grid.units
        begin = unit // self.span * self.span
        own = grid.runs(row, begin, begin + self.span - 1)
        column = torch.arange(grid.num_kv_blocks, device=grid.device)
        column = column[column % self.span >= self.span - self.summary]
        far = (grid.rows.repeat_interleave(len(column)), column.repeat(grid.num_rows))
        return torch.cat([own[0], far[0]]), torch.cat([own[1], far[1]])

    def order(self, slots: Slots) -> Tensor:
        span = self.span * (2 * self.summary / (slots.density * self.span)).round().clamp(min=1).long()
        spans = (slots.allowed // span).clamp(min=1)
        level, number = slots.rank // spans, spans - 1 - slots.rank % spans
        summary = torch.where(level < span, (number + 1) * span - 1 - level, -1)
        low, high = slots.first // span * span, (slots.last // span + 1) * span - 1
        own = outward(slots.first, slots.last, low, torch.minimum(high, slots.allowed - 1), slots.rank)
        return torch.stack([summary, own], 1)
