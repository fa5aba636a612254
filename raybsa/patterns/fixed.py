"""Fixed: the own span and the last blocks of every span. Sparse Transformer, Child et al. 2019, arXiv:1904.10509."""

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
class Fixed(Pattern):
    """Tokens see one another iff their KV blocks lie in one span, at most ``near`` blocks apart, or the key's is one of
    the last ``summary`` of a span.

    A density sets the rest. The span becomes its multiple nearest to ``2 * summary / density``, so that summaries take
    half of it, and ``near`` what these leave. Where that is more than the own span, summaries become as long as fits,
    some evenly spread ones by one block. Odd blocks go to evenly spread rows, one each. Without causality all rows keep
    the same number: summaries (the last column of each span, backwards, then the last but one, ...) and the own span's
    blocks (nearest first) take turns.

    Args:
        span: blocks.
        summary: blocks at the end of each span; span number n has ``floor((n + 1) * summary) - floor(n * summary)``.
        near: blocks; the whole span where None.
    """

    span: int = 8
    summary: float = 1
    near: int | None = None
    family: ClassVar[str] = "fixed"
    free: ClassVar[tuple[str, ...]] = ("near",)

    def __post_init__(self) -> None:
        integer("span", self.span)
        if not isinstance(self.summary, (int, float)) or isinstance(self.summary, bool) or not self.summary > 0:
            raise ValueError(f"summary must be a positive number of blocks, got {self.summary!r}")
        if self.summary > self.span:
            raise ValueError(f"summary must be at most span = {self.span} blocks, got {self.summary}")
        if self.near is not None:
            integer("near", self.near, least=0)

    @property
    def size(self) -> str:
        near = "all near ones" if self.near is None else f"{self.near:,} near ones"
        return f"spans of {self.span:,} blocks, {self.summary:.3g} of them seen by all, {near}"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        row, unit = grid.units
        begin = unit // self.span * self.span
        near = self.span if self.near is None else self.near
        own = grid.runs(row, torch.maximum(begin, unit - near), torch.minimum(begin + self.span - 1, unit + near))
        column = torch.arange(grid.num_kv_blocks, device=grid.device)
        number = column // self.span
        column = column[column % self.span >= self.span - (self._before(number + 1) - self._before(number))]
        far = (grid.rows.repeat_interleave(len(column)), column.repeat(grid.num_rows))
        return torch.cat([own[0], far[0]]), torch.cat([own[1], far[1]])

    def at(self, grid: Grid, total: int) -> Fixed:
        density = total / grid.allowed_blocks
        span = self.span * max(1, round(2 * self.summary / (density * self.span)))
        if not grid.causal:
            return Fixed(span, self.summary)
        far = Fixed(span, self.summary, near=0)
        while far.span < grid.num_kv_blocks and int(far.own(grid).sum()) > total:
            far = replace(far, span=far.span + self.span)
        near = fit(lambda near: replace(far, near=near).own(grid), 0, far.span - 1, total)
        if near < far.span - 1:
            return replace(far, near=near)
        spans = max(1, grid.num_kv_blocks // far.span)

        def whole(columns: int) -> Fixed:
            return Fixed(far.span, columns / spans)

        fewest = round(self.summary * spans)
        return whole(fit(lambda columns: whole(columns).own(grid), fewest, far.span * spans, total))

    def own(self, grid: Grid) -> Tensor:
        """Of causal rows alone."""
        near = (grid.first % self.span).clamp(max=self.span if self.near is None else self.near)
        return grid.width + near + self._before(grid.first // self.span)

    def order(self, slots: Slots) -> Tensor:
        low, high = slots.first // self.span * self.span, (slots.last // self.span + 1) * self.span - 1
        if self.near is not None:
            low, high = torch.maximum(low, slots.first - self.near), torch.minimum(high, slots.last + self.near)
        own = outward(slots.first, slots.last, low, torch.minimum(high, slots.allowed - 1), slots.rank)
        return torch.stack([self._summaries(slots), own], 1)

    def _summaries(self, slots: Slots) -> Tensor:
        """(n,): the last column of each span, backwards, then the last but one, ...; those of the longer summaries
        last."""
        causal = slots.grid.causal
        spans = ((slots.first if causal else slots.allowed) // self.span).clamp(min=0 if causal else 1)
        whole = int(self.summary) if causal else self.span
        level, turn = slots.rank // spans.clamp(min=1), slots.rank % spans.clamp(min=1)
        even = torch.where((level < whole) & (spans > 0), (spans - turn) * self.span - 1 - level, -1)
        if whole >= self.summary:
            return even
        number = torch.arange(slots.grid.num_kv_blocks // self.span + 1, device=slots.rank.device)
        longer = slots.rank - whole * spans
        place = torch.searchsorted(self._before(number) - whole * number, longer.clamp(min=0), right=True)
        is_longer = (longer >= 0) & (longer < self._before(spans) - whole * spans)
        return torch.where(is_longer, place * self.span - 1 - whole, even)

    def _before(self, number: Tensor) -> Tensor:
        """Summary columns of the first ``number`` spans, int64."""
        return (number.double() * self.summary + 1e-9).floor().long()
