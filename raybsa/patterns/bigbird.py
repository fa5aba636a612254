"""BigBird: window, global and random blocks together. Zaheer et al. 2020, arXiv:2007.14062."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.budgets import fit, global_budget, with_globals
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

    A density sets the window and the number of drawn blocks; the globals stay. Global rows keep all; every other row
    keeps as many blocks more, its nearest and its drawn ones in turn, and one more in evenly spread rows.

    Args:
        window: tokens, the own one included.
        num_globals: KV blocks, the first of the sequence.
        num_random: KV blocks, from 0.
        seed: any integer from 0.
    """

    window: int = 128
    num_globals: int = 1
    num_random: int = 3
    seed: int = 0
    family: ClassVar[str] = "bigbird"
    free: ClassVar[tuple[str, ...]] = ("window", "num_random")
    one_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        integer("window", self.window)
        integer("num_globals", self.num_globals)
        integer("num_random", self.num_random, least=0)
        integer("seed", self.seed, least=0)

    @property
    def varies_by_head(self) -> bool:
        return True

    @property
    def size(self) -> str:
        return f"window of {self.window:,} tokens, {self.num_random:,} random blocks a row"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        drawn = random_blocks(grid, self.num_random, self.seed)
        found = [window_blocks(grid, self.window), global_blocks(grid, self.num_globals), drawn]
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def at(self, grid: Grid, total: int) -> BigBird:
        kept = with_globals(grid, self.num_globals)
        more = fit(lambda more: (kept + more).minimum(grid.allowed), 0, grid.num_kv_blocks, total)
        reach = -(-more // 2) if grid.causal else -(-more // 4)  # to each side
        return replace(self, window=max(1, reach * grid.kv_block_size), num_random=more // 2)

    def least(self, grid: Grid) -> Tensor:
        return with_globals(grid, self.num_globals)

    def order(self, slots: Slots) -> Tensor:
        seen_by_all = torch.where(slots.rank < self.num_globals, slots.rank, -1)
        rest = Slots(slots.grid, slots.budget, slots.row, slots.rank - self.num_globals)
        is_rest = rest.rank >= 0
        others = [torch.where(is_rest, col, -1) for col in (nearest(rest), draw(rest, self.seed))]
        return torch.stack([torch.where(is_rest, others[0], seen_by_all), others[1]], 1)

    def share_out(self, grid: Grid, total: int) -> Tensor:
        return global_budget(grid, total, self.num_globals)
