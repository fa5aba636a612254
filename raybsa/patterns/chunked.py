"""Chunked: tokens of one chunk see one another. Blockwise attention, Qiu et al. 2019, arXiv:1911.02972; shifted chunks
as in Swin, Liu et al. 2021, arXiv:2103.14030 (without its wrap-around)."""

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
class Chunked(Pattern):
    """Query token i sees key token j iff ``(i + shift) // chunk == (j + shift) // chunk``.

    Under a density a chunk is as many blocks as the largest row's budget, its shift in proportion. A row keeps its own
    chunk, nearest first; then the chunk before, from that one's start, and the chunk after, in turn.

    Args:
        chunk: tokens.
        shift: tokens by which all boundaries lie earlier, in 0 .. chunk - 1.
    """

    chunk: int = 1024
    shift: int = 0
    family: ClassVar[str] = "chunked"

    def __post_init__(self) -> None:
        integer("chunk", self.chunk)
        if integer("shift", self.shift, least=0) >= self.chunk:
            raise ValueError(f"shift must be less than chunk = {self.chunk} tokens, got {self.shift}")

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        begin = (grid.first_token + self.shift) // self.chunk * self.chunk - self.shift
        end = ((grid.last_token + self.shift) // self.chunk + 1) * self.chunk - self.shift
        return grid.token_runs(begin, end - 1)

    def order(self, slots: Slots) -> Tensor:
        chunk = slots.budget.max()
        shift = chunk * self.shift // self.chunk
        begin = (slots.first + shift) // chunk * chunk - shift
        low, high = begin.clamp(min=0), torch.minimum(begin + chunk, slots.allowed) - 1
        own = outward(slots.first, slots.last, low, high, slots.rank)
        past = slots.rank - (slots.first - low) - (high - slots.last).clamp(min=0)
        before = begin - chunk * (1 + past // chunk) + past % chunk
        after = begin + chunk + past
        return torch.stack([torch.where(past < 0, own, before), torch.where(past < 0, -1, after)], 1)
