"""Global blocks: some blocks see all and are seen by all. Longformer, Beltagy et al. 2020, arXiv:2004.05150."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.budgets import global_budget, global_rows, whole_globals, with_globals
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, skip_diagonal


@dataclass(frozen=True)
class GlobalBlocks(Pattern):
    """Query token i sees key token j iff one of them lies in the first ``num_globals`` KV blocks; each row its own too.

    A density sets the number of globals; the last may be a part of one, its column in evenly spread rows. Global rows
    keep all, the others the globals and their diagonal.

    Args:
        num_globals: KV blocks.
    """

    num_globals: int = 1
    family: ClassVar[str] = "global_blocks"
    free: ClassVar[tuple[str, ...]] = ("num_globals",)

    def __post_init__(self) -> None:
        integer("num_globals", self.num_globals)

    @property
    def size(self) -> str:
        return f"{self.num_globals:,} global blocks"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return global_blocks(grid, self.num_globals)

    def at(self, grid: Grid, total: int) -> GlobalBlocks:
        return replace(self, num_globals=whole_globals(grid, total, grid.num_kv_blocks))

    def least(self, grid: Grid) -> Tensor:
        return with_globals(grid, 1)

    def order(self, slots: Slots) -> Tensor:
        return skip_diagonal(slots, slots.rank)

    def share_out(self, grid: Grid, total: int) -> Tensor:
        return global_budget(grid, total, most_globals=grid.num_kv_blocks)


def global_blocks(grid: Grid, num_globals: int) -> tuple[Tensor, Tensor]:
    """(n,) rows and columns of the first ``num_globals`` KV blocks and of the rows that hold a token of theirs."""
    end = torch.where(global_rows(grid, num_globals), grid.num_kv_blocks, num_globals)
    return grid.runs(grid.rows, torch.zeros_like(end), end - 1)
