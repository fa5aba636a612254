"""Dilated: inside segments, every r-th block. LongNet, Ding et al. 2023, arXiv:2307.02486, at block granularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integers
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, outward


@dataclass(frozen=True)
class Dilated(Pattern):
    """Tokens see one another iff for some pair (segment length, dilation rate) they share a segment and the distance of
    their KV blocks is a multiple of the rate.

    Under a density all segments are scaled alike, so that their natural blocks (``length / rate`` of each pair) fill
    the largest row's budget; the rates stay. The pairs take turns, each with its nearest block in the row's segment;
    when all segments are spent, the pairs go on past their ends at their rates.

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

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        found = [_pair_blocks(grid, segment, rate) for segment, rate in self._pairs]
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def order(self, slots: Slots) -> Tensor:
        scale = slots.budget.max() / sum(segment / rate for segment, rate in self._pairs)
        sizes = [(scale * segment).round().long().clamp(min=rate + 1) for segment, rate in self._pairs]
        ways = [_Way(slots, size, rate) for size, rate in zip(sizes, self.dilation_rates, strict=True)]
        spent = torch.stack([way.left + way.right for way in ways]).amax(0)
        return torch.stack([torch.where(slots.rank < spent, way.inside(), way.beyond(spent)) for way in ways], 1)


def _pair_blocks(grid: Grid, segment: int, rate: int) -> tuple[Tensor, Tensor]:
    row, unit = grid.units
    first_token = torch.maximum(grid.first_token[row], unit * grid.kv_block_size)
    last_token = torch.minimum(grid.last_token[row], (unit + 1) * grid.kv_block_size - 1)
    low = first_token // segment * segment // grid.kv_block_size
    high = ((last_token // segment + 1) * segment - 1) // grid.kv_block_size
    return grid.runs(row, low + (unit - low) % rate, high, rate)


class _Way:
    """A pair's way out from the diagonal in steps of its rate, through a segment of ``size`` () int64 blocks.

    ``left`` and ``right``, (n,) int64, count its steps before the segment's ends.
    """

    def __init__(self, slots: Slots, size: Tensor, rate: int) -> None:
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
