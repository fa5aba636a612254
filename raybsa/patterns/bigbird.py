"""BigBird: window, global and random blocks together. Zaheer et al. 2020, arXiv:2007.14062."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.budgets import global_budget
from raybsa.patterns.global_blocks import global_blocks
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.random import draw, random_blocks
from raybsa.patterns.ranking import Slots, nearest
from raybsa.patterns.sliding_window import window_blocks


@dataclass(frozen=True)
class BigBird(Pattern):
    """Query token i sees key token j iff ``|i - j| < window``, or one of them lies in a global block, or the KV block
    is one of ``num_random`` drawn for the head and row (it may be one of the others).

    Under a density the globals stay as far as they fit; every other row keeps as many blocks more, its nearest and its
    drawn ones in turn. Exact in total for each head: global rows keep all.

    Args:
        window: tokens, the own one included.
        num_globals: KV blocks, the first of the sequence.
        num_random: KV blocks.
        seed: any integer from 0.
    """

    window: int = 128
    num_globals: int = 1
    num_random: int = 3
    seed: int = 0
    family: ClassVar[str] = "bigbird"

    def __post_init__(self) -> None:
        integer("window", self.window)
        integer("num_globals", self.num_globals)
        integer("num_random", self.num_random)
        integer("seed", self.seed, least=0)

    @property
    def varies_by_head(self) -> bool:
        return True

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        drawn = random_blocks(grid, self.num_random, self.seed)
        found = [window_blocks(grid, self.window), global_blocks(grid, self.num_globals), drawn]
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def order(self, slots: Slots) -> Tensor:
        seen_by_all = torch.where(slots.rank < self.num_globals, slots.rank, -1)
        rest = Slots(slots.grid, slots.budget, slots.row, slots.rank - self.num_globals)
        is_rest = rest.rank >= 0
        others = [torch.where(is_rest, col, -1) for col in (nearest(rest), draw(rest, self.seed))]
        return torch.stack([torch.where(is_rest, others[0], seen_by_all), others[1]], 1)

    def budget(self, grid: Grid, density: float) -> Tensor:
        return global_budget(grid, density, self.num_globals)
