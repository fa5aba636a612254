"""Rules that differ from head to head, as in DuoAttention, Xiao et al. 2024, arXiv:2410.10819."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid, ragged
from raybsa.patterns.pattern import Pattern, check_parts


@dataclass(frozen=True)
class PerHead(Pattern):
    """Head h follows rule ``h % len(parts)``; under a density each is the member of its family for that density.

    Args:
        parts: the rules.
    """

    parts: tuple[Pattern, ...]
    family: ClassVar[str] = "per_head"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", check_parts("per_head", self.parts))

    @property
    def varies_by_head(self) -> bool:
        return True

    def params(self) -> dict[str, Any]:
        return {"parts": [part.spec.to_dict() for part in self.parts]}

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        found = []
        for part, its_grid, its_rows in self._shares(grid):
            row, col = part.blocks(its_grid)
            found.append((its_rows[row], col))
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def at(self, grid: Grid, total: int) -> PerHead:
        return PerHead(tuple(part.at(grid, total) for part in self.parts))

    def least(self, grid: Grid) -> Tensor:
        return torch.stack([part.least(grid) for part in self.parts]).amax(0)

    def smallest(self, grid: Grid) -> int:
        return max(part.smallest(grid) for part in self.parts)

    def budgets(self, grid: Grid, total: int) -> Tensor:
        budgets = torch.zeros(grid.num_rows, dtype=torch.int64, device="cpu")
        for part, its_grid, its_rows in self._shares(grid):
            budgets[its_rows.cpu()] = part.budgets(its_grid, total)
        return budgets

    @property
    def size(self) -> str:
        return " / ".join(dict.fromkeys(part.size for part in self.parts if part.size))

    def check(self, density: float) -> float:
        for part in self.parts:
            part.check(density)
        return super().check(density)

    def ranked(self, grid: Grid, budget: Tensor) -> Tensor:
        begin = budget.cumsum(0) - budget
        ranked = torch.empty(int(budget.sum()), dtype=torch.int64, device=grid.device)
        for part, its_grid, its_rows in self._shares(grid):
            row, rank = ragged(budget[its_rows])
            ranked[begin[its_rows[row]] + rank] = part.ranked(its_grid, budget[its_rows])
        return ranked

    def _shares(self, grid: Grid) -> Iterator[tuple[Pattern, Grid, Tensor]]:
        """Each rule that has heads here, the grid of its heads, and (rows of that grid,) int64 its rows in ``grid``."""
        for turn, part in enumerate(self.parts):
            heads = [head for head in grid.heads if head % len(self.parts) == turn]
            if heads:
                yield part, grid.for_heads(heads), grid.rows[grid.head % len(self.parts) == turn]


def per_head(rules: Sequence[Pattern]) -> PerHead:
    """The rule whose heads cycle through ``rules``."""
    return PerHead(tuple(rules))
