"""Pattern: a frozen rule that gives a BlockLayout at any length; and the union of rules, ``a | b``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from raybsa.layout import BlockLayout
from raybsa.patterns import ranking
from raybsa.patterns.budgets import share_out
from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integer
from raybsa.patterns.ranking import Slots
from raybsa.spec import PatternSpec


@dataclass(frozen=True)
class Pattern(ABC):
    """A rule. A family is a frozen dataclass whose fields are JSON values, and gives ``blocks`` and mostly ``order``.

    A family of your own is named ``"module:Class"`` in specs: derive from Pattern, give ``blocks``, and where the
    nearest of its blocks should not be kept first under a density, ``order``. Under a density the longest of its rows
    are cut to one length; where it asks for more than all of the rule's blocks, every row gets equally many more.

    A density is a number of blocks, of which a family with a free parameter (the width of a window, …) makes one of its
    own members: ``at``. What the member's blocks leave of the number is spread evenly over the rows.

    Class attributes:
        family: the name in the catalog; empty in a rule of your own.
        free: the parameters that a density sets, which therefore cannot be given beside it.
        one_budget: rows of all heads keep as many blocks, though heads differ.
    """

    family: ClassVar[str] = ""
    free: ClassVar[tuple[str, ...]] = ()
    one_budget: ClassVar[bool] = False

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

    def at(self, grid: Grid, total: int) -> Pattern:
        """The member of the family that keeps ``total`` blocks of one head, or as few less as its parameters allow.

        ``order`` and ``budgets`` are asked of it. The rule itself where the family has no free parameter.
        """
        return self

    def least(self, grid: Grid) -> Tensor:
        """(num_q_blocks,) int64: columns that each row of the family's smallest member keeps. ``grid``: of one head."""
        return torch.ones_like(grid.rows)

    def own(self, grid: Grid) -> Tensor:
        """(num_q_blocks,) int64: columns that each row keeps by the rule's own parameters. ``grid``: of one head."""
        return grid.counts(*self.blocks(grid))

    def budgets(self, grid: Grid, total: int) -> Tensor:
        """(num_rows,) int64 on the CPU: columns that each row keeps, ``total`` in each head."""
        heads = grid.heads[:1] if self.one_budget or not self.varies_by_head else grid.heads
        found = [self.share_out(grid.one_head.for_heads([head]), total) for head in heads]
        return torch.cat(found).repeat(len(grid.heads) // len(heads))

    def share_out(self, grid: Grid, total: int) -> Tensor:
        """(num_q_blocks,) int64: columns that each row of a head keeps, of ``total``."""
        return share_out(grid, total, self.least(grid), self.own(grid))

    def ranked(self, grid: Grid, budget: Tensor) -> Tensor:
        """(budget.sum(),) int64: each row's ``budget`` columns in order of preference, row after row."""
        return ranking.ranked(grid, budget, self.order)

    @property
    def varies_by_head(self) -> bool:
        """Whether heads differ; where they do not, a layout has one group for all."""
        return False

    @property
    def size(self) -> str:
        """The parameters that a density sets, in words: ``window of 416 tokens``; empty where there are none."""
        return ""

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
        or_least: bool = False,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """The layout of the rule at a length, made in O(nnz) on ``device``. Every row keeps its diagonal.

        Args:
            q_len: query tokens.
            kv_len: key tokens; ``q_len`` where None.
            num_heads: groups of the layout where the rule differs between heads.
            q_block_size, kv_block_size: tokens of a block, powers of two; KV blocks are as query blocks where None.
            causal: keep no block above the diagonal.
            density: kept / allowed blocks, in (0, 1]: each head keeps ``round(density * allowed)``, by the parameters
                that ``member`` has. The diagonal comes first, from its first block on. None keeps what the parameters
                give.
            or_least: where the sequence is too short for the density, the family's smallest member instead of an error.
            device: where the layout is made and stays; torch's default where None.

        Raises:
            ValueError: a size, the density or a parameter is out of range; a density below the family's smallest
                member; or a density beside a parameter that it sets.
        """
        device = torch.empty(0, device=device).device
        grid = self._grid(q_len, kv_len, q_block_size, kv_block_size, causal, num_heads, device)
        if density is None:
            return grid.layout(*self.blocks(grid))
        total = self._total(grid, density, or_least)
        member = self.at(grid.one_head, total)
        budget = member.budgets(grid, total).to(device)
        return grid.layout_of_rows(budget, member.ranked(grid, budget))

    def member(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        density: float,
        q_block_size: int = 64,
        kv_block_size: int | None = None,
        causal: bool = False,
        or_least: bool = False,
    ) -> Pattern:
        """What a density comes to: the same family with the parameters by which ``layout`` keeps its blocks.

        The member's own layout keeps a little less: what its parameters leave of the density is spread over the rows.
        Arguments and errors are those of ``layout``.
        """
        grid = self._grid(q_len, kv_len, q_block_size, kv_block_size, causal, 1, torch.device("cpu"))
        return self.at(grid, self._total(grid, density, or_least))

    def check(self, density: float) -> float:
        """The density, for which this rule has room.

        Raises:
            ValueError: it does not lie in (0, 1], or a parameter that a density sets was given another value than its
                default.
        """
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            if parameter.name in self.free and value != parameter.default:
                raise ValueError(
                    f"{self.family or type(self).__name__} was given {parameter.name}={value!r} and density={density}, "
                    f"and a density sets {parameter.name}: give one of the two"
                )
        return check_density(density)

    def smallest(self, grid: Grid) -> int:
        """Blocks of one head of the family's smallest member."""
        return int(self.least(grid).sum())

    def _grid(
        self,
        q_len: int,
        kv_len: int | None,
        q_block_size: int,
        kv_block_size: int | None,
        causal: bool,
        num_heads: int,
        device: torch.device,
    ) -> Grid:
        integer("num_heads", num_heads)
        kv_len = q_len if kv_len is None else kv_len
        kv_block_size = q_block_size if kv_block_size is None else kv_block_size
        heads = tuple(range(num_heads if self.varies_by_head else 1))
        return Grid(q_len, kv_len, q_block_size, kv_block_size, bool(causal), num_heads, heads, device)

    def _total(self, grid: Grid, density: float, or_least: bool) -> int:
        """Blocks that each head keeps at a density."""
        allowed, smallest = grid.allowed_blocks, self.smallest(grid.one_head)
        total = round(self.check(density) * allowed)
        if total < smallest and not or_least:
            raise ValueError(
                f"{self.family or type(self).__name__} keeps at least {smallest} of the {allowed} blocks at "
                f"{grid.q_len} x {grid.kv_len} tokens in blocks of {grid.q_block_size} x {grid.kv_block_size}: a "
                f"density from {smallest / allowed:.4g} on was wanted, got {density:g}; or smaller blocks"
            )
        return max(total, smallest)

    def __or__(self, other: Pattern) -> Union:
        """The rule that keeps the blocks of either."""
        return Union((*_parts(self), *_parts(other))) if isinstance(other, Pattern) else NotImplemented


@dataclass(frozen=True)
class Union(Pattern):
    """The blocks of any part. Under a density the parts take turns, each in its own order.

    Every part is the member of its family for an equal share of the density; what they keep both goes to the nearest
    blocks of the row.

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

    def at(self, grid: Grid, total: int) -> Union:
        return Union(tuple(part.at(grid, self._share(part, grid, total)) for part in self.parts))

    def least(self, grid: Grid) -> Tensor:
        beyond_diagonal = torch.stack([part.least(grid) - 1 for part in self.parts]).sum(0)
        return torch.minimum(1 + beyond_diagonal, grid.allowed)

    def budgets(self, grid: Grid, total: int) -> Tensor:
        """As much as the parts keep one beside the other."""
        alone, lists = grid.one_head, self._lists(grid, total)
        least = self.least(alone)
        heads = torch.stack(lists).sum(0).split(grid.num_q_blocks)
        wanted = [torch.minimum(own, alone.allowed).maximum(least) for own in heads]
        return torch.cat([share_out(alone, total, least, own) for own in wanted])

    def ranked(self, grid: Grid, budget: Tensor) -> Tensor:
        total = int(budget[: grid.num_q_blocks].sum())
        counts = [found.to(grid.device) for found in self._lists(grid, total)]
        lists = [(its, part.ranked(grid, its)) for part, its in zip(self.parts, counts, strict=True)]
        return ranking.ranked(
            grid, budget, lambda slots: torch.stack([ranking.listed(slots, *found) for found in lists], 1)
        )

    @property
    def size(self) -> str:
        return " | ".join(part.size for part in self.parts if part.size)

    def check(self, density: float) -> float:
        for part in self.parts:
            part.check(density)
        return super().check(density)

    def _lists(self, grid: Grid, total: int) -> list[Tensor]:
        return [part.budgets(grid, self._share(part, grid.one_head, total)) for part in self.parts]

    def _share(self, part: Pattern, grid: Grid, total: int) -> int:
        return max(total // len(self.parts), part.smallest(grid))

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
