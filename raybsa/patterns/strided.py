"""Strided: the near blocks and every stride-th one. Sparse Transformer, Child et al. 2019, arXiv:1904.10509."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.budgets import fit
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, nearest, outward


@dataclass(frozen=True)
class Strided(Pattern):
    """Tokens see one another iff the distance of their KV blocks is at most ``near`` or a multiple of ``stride``.

    A density sets both: the stride becomes its multiple nearest to ``2 / density``, so that strided blocks take half of
    it, and the near blocks what these leave, one more in evenly spread rows. Without causality all rows keep the same
    number: strided and near blocks take turns from the diagonal outwards.

    Args:
        stride: blocks.
        near: blocks, as many as the stride where None.
    """

    stride: int = 8
    near: int | None = None
    family: ClassVar[str] = "strided"
    free: ClassVar[tuple[str, ...]] = ("near",)

    def __post_init__(self) -> None:
        integer("stride", self.stride)
        if self.near is not None:
            integer("near", self.near, least=0)

    @property
    def size(self) -> str:
        return f"stride of {self.stride:,} blocks, {self.stride if self.near is None else self.near:,} near ones"

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        row, unit = grid.units
        reach = self.stride if self.near is None else self.near
        near = grid.runs(row, unit - reach, unit + reach)
        far = grid.runs(row, unit % self.stride, torch.full_like(unit, grid.num_kv_blocks - 1), self.stride)
        return torch.cat([near[0], far[0]]), torch.cat([near[1], far[1]])

    def at(self, grid: Grid, total: int) -> Strided:
        density = total / grid.allowed_blocks
        stride = self.stride * max(1, round(2 / (density * self.stride)))
        if not grid.causal:
            return Strided(stride)
        far = Strided(stride, near=0)
        while far.stride < grid.num_kv_blocks and int(far.own(grid).sum()) > total:
            far = Strided(far.stride + self.stride, near=0)
        near = fit(lambda near: replace(far, near=near).own(grid), 0, grid.num_kv_blocks, total)
        return replace(far, near=near)

    def own(self, grid: Grid) -> Tensor:
        """Of causal rows alone."""
        near = grid.first.clamp(max=self.stride if self.near is None else self.near)
        return grid.width + near + grid.first // self.stride - near // self.stride

    def order(self, slots: Slots) -> Tensor:
        low = torch.zeros_like(slots.row)
        far = outward(slots.first, slots.last, low, slots.allowed - 1, slots.rank, self.stride)
        near = nearest(slots)
        if self.near is not None:
            near = torch.where(torch.maximum(slots.first - near, near - slots.last) > self.near, -1, near)
        return torch.stack([far, near], 1)
