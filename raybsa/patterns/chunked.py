"""Chunked: tokens of one chunk see one another. Blockwise attention, Qiu et al. 2019, arXiv:1911.02972; shifted chunks
as in Swin, Liu et al. 2021, arXiv:2103.14030 (without its wrap-around)."""

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


@dataclass(frozen=True)
class Chunked(Pattern):
    """Query token i sees key token j iff ``(i + shift) // chunk == (j + shift) // chunk``.

    A density sets the chunk, a number of whole blocks, and the shift in proportion. What they leave of it goes to
    evenly spread rows, the nearest block outside of their chunk each. Without causality all rows keep the same number.

    Args:
        chunk: tokens.
        shift: tokens by which all boundaries lie earlier, in 0 .. chunk - 1.
    """

    chunk: int = 1024
    shift: int = 0
    family: ClassVar[str] = "chunked"
    free: ClassVar[tuple[str, ...]] = ("chunk",)

    def __post_init__(self) -> None:
        integer("chunk", self.chunk)
        if integer("shift", self.shift, least=0) >= self.chunk:
            raise ValueError(f"shift must be less than chunk = {self.chunk} tokens, got {self.shift}")

    @property
    def size(self) -> str:
        return f"chunks of {self.chunk:,} tokens"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        begin = (grid.first_token + self.shift) // self.chunk * self.chunk - self.shift
        end = ((grid.last_token + self.shift) // self.chunk + 1) * self.chunk - self.shift
        return grid.token_runs(begin, end - 1)

    def at(self, grid: Grid, total: int) -> Chunked:
        chunk = max(1, total // grid.num_rows)
        if grid.causal:
            most = -(-grid.num_kv_blocks * self.chunk // (self.chunk - self.shift))
            chunk = fit(lambda size: self._of(grid, size).own(grid), 1, most, total)
        return self._of(grid, chunk)

    def own(self, grid: Grid) -> Tensor:
        low, high = self._columns(grid)
        return torch.maximum(high, grid.last) - low + 1

    def order(self, slots: Slots) -> Tensor:
        low, high = (ends[slots.row] for ends in self._columns(slots.grid))
        return outward(slots.first, slots.last, low, high, slots.rank)

    def _of(self, grid: Grid, blocks: int) -> Chunked:
        """The member whose chunks have so many blocks."""
        shift = blocks * self.shift // self.chunk
        return replace(self, chunk=blocks * grid.kv_block_size, shift=shift * grid.kv_block_size)

    def _columns(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """(num_rows,) int64 each: the first and the last column of every row's chunk, in whole blocks."""
        chunk, shift = max(1, self.chunk // grid.kv_block_size), self.shift // grid.kv_block_size
        begin = (grid.first + shift) // chunk * chunk - shift
        return begin.clamp(min=0), torch.minimum(begin + chunk, grid.allowed) - 1
