"""A family of the tests' own that cannot be laid out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.pattern import Pattern


@dataclass(frozen=True)
class Failing(Pattern):
    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        raise ValueError("not today")
