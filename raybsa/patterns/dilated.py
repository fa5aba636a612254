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

    Under a density the pairs take turns, each with its nearest block in the row's segment; past the segment's ends a
    pair goes on at its rate.

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
        return torch.stack([_pair_order(slots, segment, rate) for segment, rate in self._pairs], 1)


def _pair_blocks(grid: Grid, segment: int, rate: int) -> tuple[Tensor, Tensor]:
    row, unit = grid.units
    first_token = torch.maximum(grid.first_token[row], unit * grid.kv_block_size)
    last_token = torch.minimum(grid.last_token[row], (unit + 1) * grid.kv_block_size - 1)
    low = first_token // segment * segment // grid.kv_block_size
    high = ((last_token // segment + 1) * segment - 1) // grid.kv_block_size
    return grid.runs(row, low + (unit - low) % rate, high, rate)


def _pair_order(slots: Slots, segment: int, rate: int) -> Tensor:
    grid, first, last = slots.grid, slots.first, slots.last
    low = grid.first_token[slots.row] // segment * segment // grid.kv_block_size
    high = ((grid.last_token[slots.row] // segment + 1) * segment - 1) // grid.kv_block_size
    high = torch.minimum(high, slots.allowed - 1)
    left, right = ((first - low) // rate).clamp(min=0), ((high - last) // rate).clamp(min=0)
    inside = outward(first, last, low, high, slots.rank, rate)
    edges = (first - left * rate, last + right * rate)
    beyond = outward(*edges, torch.zeros_like(low), slots.allowed - 1, slots.rank - left - right, rate)
    return torch.where(inside >= 0, inside, beyond)
