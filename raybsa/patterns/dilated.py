"""Dilated: inside segments, every r-th block. LongNet, Ding et al. 2023, arXiv:2307.02486, at block granularity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.budgets import fit
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integers
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, outward


@dataclass(frozen=True)
class Dilated(Pattern):
    """Tokens see one another iff for some pair (segment length, dilation rate) they share a segment and the distance of
    their KV blocks is a multiple of the rate.

    A density scales the segments, all alike, to whole blocks; the rates stay, and of the lengths only their proportions
    count. What that leaves of it goes to evenly spread rows, which go on past their segments at the rates. Without
    causality all rows keep the same number: the pairs take turns, each with its nearest block in the row's segment.

    Args:
        segment_lengths: tokens.
        dilation_rates: blocks; one a segment length.
    """

    segment_lengths: tuple[int, ...] = (2048, 4096, 8192)
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    family: ClassVar[str] = "dilated"

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment_lengths", integers("segment_lengths", self.segment_lengths))
        object.__setattr__(self, "dilation_rates", integers("dilation_rates", self.dilation_rates))
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                "segment_lengths and dilation_rates must pair up, "
                f"got {len(self.segment_lengths)} lengths and {len(self.dilation_rates)} rates"
            )

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def size(self) -> str:
        return f"segments of {', '.join(f'{length:,}' for length in self.segment_lengths)} tokens"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        found = [_pair_blocks(grid, segment, rate) for segment, rate in self._pairs]
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def at(self, grid: Grid, total: int) -> Dilated:
        if not grid.causal:
            scale = max(1, total // grid.num_rows) / sum(segment / rate for segment, rate in self._pairs)
            return self._of(grid, [max(rate + 1, round(scale * segment)) for segment, rate in self._pairs])
        shortest, longest = min(self.segment_lengths), max(self.segment_lengths)
        most = -(-grid.num_kv_blocks * longest // shortest)
        size = fit(lambda size: self._scaled(grid, size).own(grid), 1, most, total)
        return self._scaled(grid, size)

    def own(self, grid: Grid) -> Tensor:
        """Of causal rows alone: a distance counts where it is a multiple of a pair's rate within its segment."""
        found = grid.width
        ways = [(grid.first - grid.first // size * size, rate) for size, rate in self._sizes(grid)]
        for count in range(1, len(ways) + 1):
            for some in combinations(ways, count):  # what pairs share: inclusion and exclusion
                reach = reduce(torch.minimum, [left for left, _ in some])
                found = found - (-1) ** count * (reach // lcm(*(rate for _, rate in some)))
        return found

    def order(self, slots: Slots) -> Tensor:
        ways = [_Way(slots, size, rate) for size, rate in self._sizes(slots.grid)]
        spent = torch.stack([way.left + way.right for way in ways]).amax(0)
        return torch.stack([torch.where(slots.rank < spent, way.inside(), way.beyond(spent)) for way in ways], 1)

    def _scaled(self, grid: Grid, longest: int) -> Dilated:
        """The member whose longest segment has so many blocks."""
        most = max(self.segment_lengths)
        return self._of(grid, [max(1, round(longest * segment / most)) for segment in self.segment_lengths])

    def _of(self, grid: Grid, sizes: list[int]) -> Dilated:
        return replace(self, segment_lengths=tuple(size * grid.kv_block_size for size in sizes))

    def _sizes(self, grid: Grid) -> list[tuple[int, int]]:
        """Each pair's segment in whole blocks, and its rate."""
        return [(max(1, segment // grid.kv_block_size), rate) for segment, rate in self._pairs]


def _pair_blocks(grid: Grid, segment: int, rate: int) -> tuple[Tensor, Tensor]:
    row, unit = grid.units
    first_token = torch.maximum(grid.first_token[row], unit * grid.kv_block_size)
    last_token = torch.minimum(grid.last_token[row], (unit + 1) * grid.kv_block_size - 1)
    low = first_token // segment * segment // grid.kv_block_size
    high = ((last_token // segment + 1) * segment - 1) // grid.kv_block_size
    return grid.runs(row, low + (unit - low) % rate, high, rate)


class _Way:
    """A pair's way out from the diagonal in steps of its rate, through a segment of ``size`` blocks.

    ``left`` and ``right``, (n,) int64, count its steps before the segment's ends.
    """

    def __init__(self, slots: Slots, size: int, rate: int) -> None:
        self.slots, self.rate = slots, rate
        self.low = slots.first // size * size
        self.high = torch.minimum((slots.last // size + 1) * size, slots.allowed) - 1
        self.left, self.right = (slots.first - self.low) // rate, (self.high - slots.last) // rate

    def inside(self) -> Tensor:
        """(n,) columns in the segment, by rank."""
        return outward(self.slots.first, self.slots.last, self.low, self.high, self.slots.rank, self.rate)

    def beyond(self, spent: Tensor) -> Tensor:
        """(n,) columns past the segment, by rank from ``spent`` on."""
        first, last = self.slots.first - self.left * self.rate, self.slots.last + self.right * self.rate
        ends = (torch.zeros_like(first), self.slots.allowed - 1)
        return outward(first, last, *ends, self.slots.rank - spent, self.rate)
