"""Strided: the near blocks and every stride-th one. Sparse Transformer, Child et al. 2019, arXiv:1904.10509."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, nearest, outward


@dataclass(frozen=True)
class Strided(Pattern):
    """Tokens see one another iff the distance of their KV blocks is at most ``stride`` or a multiple of it.

    Under a density the stride becomes its multiple nearest to ``2 / density``, so that strided blocks take half of the
    budget; strided and near blocks take turns from the diagonal outwards.

    Args:
        stride: blocks.
    """

    stride: int = 8
    family: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        integer("stride", self.stride)

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        row, unit = grid.units
        near = grid.runs(row, unit - self.stride, unit + self.stride)
        far = grid.runs(row, unit % self.stride, torch.full_like(unit, grid.num_kv_blocks - 1), self.stride)
        return torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]])

    def order(self, slots: Slots) -> Tensor:
        stride = self.stride * (2 / (slots.density * self.stride)).round().clamp(min=1).long()
        low = torch.zeros_like(slots.row)
        far = outward(slots.first, slots.last, low, slots.allowed - 1, slots.rank, stride)
        return torch.stack([far, nearest(slots)], 1)
