"""Vertical-slash: chosen columns and chosen diagonals. MInference, Jiang et al. 2024, arXiv:2407.02490."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integers
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Query token i sees key token j iff j is one of ``columns`` or ``|i - j|`` is one of ``offsets``.

    Under a density columns and diagonals take turns: first those of the rule, then evenly spread ones, a column every
    ``2 / density`` blocks from the first on, and a diagonal every ``2 / density`` blocks, half-way between (by the
    density that the rounded budgets come to).

    Args:
        columns: tokens; those past the keys do not count.
        offsets: tokens.
    """

    columns: tuple[int, ...] = (0, 1024)
    offsets: tuple[int, ...] = (0, 512, 2048)
    family: ClassVar[str] = "vertical_slash"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", integers("columns", self.columns, least=0))
        object.__setattr__(self, "offsets", integers("offsets", self.offsets, least=0))

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        found = [grid.token_runs(token, token) for token in (torch.full_like(grid.rows, c) for c in self.columns)]
        for offset in self.offsets:
            found.append(grid.token_runs(grid.first_token - offset, grid.last_token - offset))
            found.append(grid.token_runs(grid.first_token + offset, grid.last_token + offset))
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def order(self, slots: Slots) -> Tensor:
        size, spacing = slots.grid.kv_block_size, (2 / slots.density).round().long()
        column = _chosen_then_spread(slots, [c // size for c in self.columns], spacing, 0 * spacing)
        offset = _chosen_then_spread(slots, [-(-o // size) for o in self.offsets], spacing, spacing // 2)
        return torch.stack([column, slots.first - offset, slots.last + offset], 1)


def _chosen_then_spread(slots: Slots, chosen: list[int], spacing: Tensor, begin: Tensor) -> Tensor:
    """(n,): entry number ``rank`` of ``*chosen, begin, begin + spacing, begin + 2 * spacing, ...``."""
    table = torch.tensor(chosen, dtype=torch.int64, device=slots.rank.device)
    spread = begin + spacing * (slots.rank - len(chosen))
    return torch.where(slots.rank < len(chosen), table[slots.rank.clamp(max=len(chosen) - 1)], spread)
