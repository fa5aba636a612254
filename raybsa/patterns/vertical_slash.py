"""Vertical-slash: chosen columns and chosen diagonals. MInference, Jiang et al. 2024, arXiv:2407.02490."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from raybsa.patterns.budgets import fit
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integers
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Query token i sees key token j iff j is one of ``columns`` or ``|i - j|`` is one of ``offsets``.

    A density adds columns and diagonals, as many of the one as of the other, evenly spread: columns from the first
    block on, diagonals half-way between. Where it does not hold all of the rule's own, these come in turn, the first
    column and diagonal in any case. What whole lines leave of it goes to evenly spread rows, the nearest block each.
    Without causality all rows keep the same number: columns and diagonals take turns, those of the rule first.

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

    @property
    def size(self) -> str:
        return f"{len(set(self.columns)):,} columns, {len(set(self.offsets)):,} diagonals"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        found = [grid.token_runs(token, token) for token in (torch.full_like(grid.rows, c) for c in self.columns)]
        for offset in self.offsets:
            found.append(grid.token_runs(grid.first_token - offset, grid.last_token - offset))
            found.append(grid.token_runs(grid.first_token + offset, grid.last_token + offset))
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def at(self, grid: Grid, total: int) -> VerticalSlash:
        if not grid.causal:
            spacing = round(2 * grid.allowed_blocks / total)
            return self._with(grid, *_lines(grid, -(-grid.num_kv_blocks // spacing), spacing))

        def taken(count: int) -> VerticalSlash:
            return replace(self, columns=self.columns[: 1 + count // 2], offsets=self.offsets[: 1 + (count + 1) // 2])

        def spread(count: int) -> VerticalSlash:
            return self._with(grid, *_lines(grid, count, grid.num_kv_blocks / max(1, count)))

        if int(self.own(grid).sum()) > total:
            most = 2 * max(len(self.columns), len(self.offsets))
            return taken(fit(lambda count: taken(count).own(grid), 0, most, total))
        most = min(grid.num_kv_blocks, 2 + 2 * total // grid.num_kv_blocks)  # so many columns hold half of the blocks
        return spread(fit(lambda count: spread(count).own(grid), 0, most, total))

    def least(self, grid: Grid) -> Tensor:
        first = VerticalSlash(self.columns[:1], self.offsets[:1])
        return first.own(grid) if grid.causal else torch.ones_like(grid.rows)

    def own(self, grid: Grid) -> Tensor:
        """Of causal rows alone: its columns and diagonals, but one for each crossing of the two."""
        columns, offsets = self._in_blocks(grid)
        column, offset = (torch.zeros(grid.num_kv_blocks, dtype=torch.int64, device=grid.device) for _ in range(2))
        column[columns[columns < grid.num_kv_blocks]] = 1
        offset[offsets[offsets < grid.num_kv_blocks]] = 1
        offset[0] = 1  # the diagonal
        before = torch.cat([column.new_zeros(1), column.cumsum(0)])
        wide = grid.width - 1 - (before[grid.last + 1] - before[grid.first + 1])
        return before[grid.last + 1] + offset.cumsum(0)[grid.first] - _crossings(column, offset)[grid.first] + wide

    def order(self, slots: Slots) -> Tensor:
        lines = self._in_blocks(slots.grid)
        if slots.grid.causal:
            lines = [line.unique() for line in lines]  # ascending: a row's own before those that it does not see
        columns, offsets = (_listed(line, slots.rank) for line in lines)
        none = offsets < 0
        left, right = slots.first - offsets, slots.last + offsets
        return torch.stack([columns, torch.where(none, -1, left), torch.where(none, -1, right)], 1)

    def _with(self, grid: Grid, columns: list[int], offsets: list[int]) -> VerticalSlash:
        size = grid.kv_block_size
        more = (tuple(size * line for line in lines) for lines in (columns, offsets))
        return VerticalSlash(*(a + b for a, b in zip((self.columns, self.offsets), more, strict=True)))

    def _in_blocks(self, grid: Grid) -> list[Tensor]:
        size, device = grid.kv_block_size, grid.device
        columns = torch.tensor(self.columns, dtype=torch.int64, device=device) // size
        return [columns, (torch.tensor(self.offsets, dtype=torch.int64, device=device) + size - 1) // size]


def _lines(grid: Grid, count: int, spacing: float) -> tuple[list[int], list[int]]:
    """So many columns, ``spacing`` blocks apart from the first one on, and diagonals half-way between."""
    place = range(count)
    return [int(spacing * k + 1e-9) for k in place], [int(spacing * k + spacing / 2 + 1e-9) for k in place]


def _listed(lines: Tensor, rank: Tensor) -> Tensor:
    """(n,): line number ``rank``; -1 past the last."""
    return torch.where(rank < len(lines), lines[rank.clamp(max=len(lines) - 1)], -1)


def _crossings(column: Tensor, offset: Tensor) -> Tensor:
    """(n,) int64 on the CPU: pairs of a column c and a diagonal d with ``c + d`` = row; both (n,) 0 or 1."""
    size = 2 * len(column)
    product = np.fft.rfft(column.numpy(), size) * np.fft.rfft(offset.numpy(), size)
    return torch.from_numpy(np.fft.irfft(product, size)[: len(column)]).round().long()
