"""Random: blocks drawn at random for each row and head, a part of BigBird, Zaheer et al. 2020, arXiv:2007.14062."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.counter import Stream, hash_u32
from raybsa.patterns import ranking
from raybsa.patterns.budgets import fit
from raybsa.patterns.grid import Grid, ragged
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.permutation import permuted
from raybsa.patterns.ranking import Slots, skip_diagonal


@dataclass(frozen=True)
class Random(Pattern):
    """Each row keeps its diagonal and ``num_random`` other blocks, drawn without repeats for each head and row.

    Draws come from (seed, head, query block) alone, so that they are the same on every device and rank. A density sets
    their number: the same in all rows, as far as they see so many, and one more in evenly spread ones.

    Args:
        num_random: blocks, from 0.
        seed: any integer from 0.
    """

    num_random: int = 3
    seed: int = 0
    family: ClassVar[str] = "random"
    free: ClassVar[tuple[str, ...]] = ("num_random",)
    one_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        integer("num_random", self.num_random, least=0)
        integer("seed", self.seed, least=0)

    @property
    def varies_by_head(self) -> bool:
        return True

    @property
    def size(self) -> str:
        return f"{self.num_random:,} random blocks a row"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return random_blocks(grid, self.num_random, self.seed)

    def at(self, grid: Grid, total: int) -> Random:
        num_random = fit(lambda count: (grid.width + count).minimum(grid.allowed), 0, grid.num_kv_blocks, total)
        return replace(self, num_random=num_random)

    def own(self, grid: Grid) -> Tensor:
        return grid.allowed  # rows are even

    def order(self, slots: Slots) -> Tensor:
        return draw(slots, self.seed)

    def ranked(self, grid: Grid, budget: Tensor) -> Tensor:
        return ranking.ranked_without_repeats(grid, budget, self.order)


def random_blocks(grid: Grid, num_random: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n,) rows and columns: ``num_random`` draws in each row, or as many as it has."""
    counts = torch.full_like(grid.rows, min(num_random, grid.num_kv_blocks))
    row, rank = ragged(counts)
    return row, draw(Slots(grid, counts, row, rank), seed)


def draw(slots: Slots, seed: int) -> Tensor:
    """(n,): choice number ``rank`` of the row's own permutation of the allowed columns off the diagonal."""
    grid = slots.grid
    size = grid.allowed - grid.width
    key = hash_u32(seed, Stream.LAYOUT, grid.head, grid.q_block)
    free = slots.allowed - slots.width
    col = permuted(torch.minimum(slots.rank, free - 1).clamp(min=0), slots.row, size.clamp(min=1), key)
    return torch.where(slots.rank < free, skip_diagonal(slots, col), -1)
