"""Pattern: a frozen rule that gives a BlockLayout at any length; and the union of rules, ``a | b``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from raybsa.layout import BlockLayout
from raybsa.patterns import ranking
from raybsa.patterns.budgets import row_budget
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.ranking import Slots
from raybsa.spec import PatternSpec


@dataclass(frozen=True)
class Pattern(ABC):
    """A rule. A family is a frozen dataclass whose fields are JSON values, and gives ``blocks`` and mostly ``order``.

    A family of your own is named ``"module:Class"`` in specs: derive from Pattern, give ``blocks``, and where the
    nearest of its blocks should not be kept first under a density, ``order``.
    """

    family: ClassVar[str] = ""

    @abstractmethod
    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """(n,) int64 rows and columns that the rule keeps by its own parameters, in any order.

        Repeats, columns out of range or above the diagonal, and a missing diagonal do no harm.
        """

    def order(self, slots: Slots) -> Tensor:
        """(n,) or (n, choices) int64: the column that a row keeps as its choice number ``rank`` under a density.

        See ``raybsa.patterns.ranking``. By default the rule's own blocks, those nearest to the diagonal first.
        """
        row, col = self.blocks(slots.grid)
        return ranking.among(slots, row, col)

    def budget(self, grid: Grid, density: float) -> Tensor:
        """(num_rows,) int64: columns that each row keeps at a density."""
        return row_budget(grid, density)

    def ranked(self, grid: Grid, budget: Tensor) -> Tensor:
        """(budget.sum(),) int64: each row's ``budget`` columns in order of preference, row after row."""
        return ranking.ranked(grid, budget, self.order)

    @property
    def varies_by_head(self) -> bool:
        """Whether heads differ; where they do not, a layout has one group for all."""
        return False

    def params(self) -> dict[str, Any]:
        """The parameters as JSON values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def spec(self) -> PatternSpec:
        """The rule as plain data: ``build(rule.spec) == rule``."""
        cls = type(self)
        return PatternSpec(cls.family or f"{cls.__module__}:{cls.__qualname__}", self.params())

    def layout(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        num_heads: int = 1,
        q_block_size: int = 64,
        kv_block_size: int | None = None,
        causal: bool = False,
        density: float | None = None,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """The layout of the rule at a length, made in O(nnz) on ``device``. Every row keeps its diagonal.

        Args:
            q_len: query tokens.
            kv_len: key tokens; ``q_len`` where None.
            num_heads: groups of the layout where the rule differs between heads.
            q_block_size, kv_block_size: tokens of a block, powers of two; KV blocks are as query blocks where None.
            causal: keep no block above the diagonal.
            density: kept / allowed blocks, in (0, 1]: exactly ``max(1, round(density * allowed))`` in every row, or in
                total where the family's rows differ (global_blocks, bigbird); the order of preference is the
                family's. The diagonal comes first, from its first block on. None keeps what the parameters give.
            device: where the layout is made and stays; torch's default where None.

        Raises:
            ValueError: a size, the density or a parameter is out of range.
        """
        integer("num_heads", num_heads)
        grid = Grid(
            q_len,
            q_len if kv_len is None else kv_len,
            q_block_size,
            q_block_size if kv_block_size is None else kv_block_size,
            bool(causal),
            num_heads,
            tuple(range(num_heads if self.varies_by_head else 1)),
            torch.empty(0, device=device).device,
        )
        if density is None:
            return grid.layout(*self.blocks(grid))
        budget = self.budget(grid, check_density(density))
        return grid.layout_of_rows(budget, self.ranked(grid, budget))

    def __or__(self, other: Pattern) -> Union:
        """The rule that keeps the blocks of either."""
        return Union((*_parts(self), *_parts(other))) if isinstance(other, Pattern) else NotImplemented


@dataclass(frozen=True)
class Union(Pattern):
    """The blocks of any part. Under a density the parts take turns, each in its own order.

    Args:
        parts: the rules.
    """

    parts: tuple[Pattern, ...]
    family: ClassVar[str] = "union"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", check_parts("union", self.parts))

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        found = [part.blocks(grid) for part in self.parts]
        return torch.cat([row for row, _ in found]), torch.cat([col for _, col in found])

    def ranked(self, grid: Grid, budget: Tensor) -> Tensor:
        lists = [part.ranked(grid, budget) for part in self.parts]
        return ranking.ranked(
            grid, budget, lambda slots: torch.stack([ranking.listed(slots, budget, col) for col in lists], 1)
        )

    @property
    def varies_by_head(self) -> bool:
        return any(part.varies_by_head for part in self.parts)

    def params(self) -> dict[str, Any]:
        return {"parts": [part.spec.to_dict() for part in self.parts]}


def check_density(density: float) -> float:
    """Raises ValueError unless density lies in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density!r}")
    return float(density)


def check_parts(name: str, parts: Any) -> tuple[Pattern, ...]:
    """Raises TypeError unless ``parts`` is a non-empty list of patterns."""
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, Pattern) for part in parts):
        raise TypeError(f"{name} is made of a non-empty list of patterns, got {parts!r}")
    return tuple(parts)


def _parts(rule: Pattern) -> tuple[Pattern, ...]:
    return rule.parts if isinstance(rule, Union) else (rule,)
