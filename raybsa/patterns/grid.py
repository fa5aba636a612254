"""Grid: the rows, columns and diagonal of a layout that a pattern is about to fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from raybsa.axis import check_geometry, num_blocks
from raybsa.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Grid:
    """Geometry as tensors of one value a *row*: a query block of one head, in the order head by head.

    The diagonal of a row is every KV block that overlaps its query tokens; the last KV block where those tokens lie
    beyond the keys. A *unit* is the KV block in whose place a query token stands, which may lie beyond the keys.

    Args:
        q_len, kv_len: tokens.
        q_block_size, kv_block_size: tokens of a block, powers of two.
        causal: a row may keep only the KV blocks that start at or before its last token.
        num_heads: heads of the whole layout.
        heads: the heads whose rows are filled here, numbered in the whole layout.
        device: where every tensor lies.
    """

    q_len: int
    kv_len: int
    q_block_size: int
    kv_block_size: int
    causal: bool
    num_heads: int
    heads: tuple[int, ...]
    device: torch.device

    def __post_init__(self) -> None:
        check_geometry(self.q_len, self.kv_len, self.q_block_size, self.kv_block_size)

    def for_heads(self, heads: Sequence[int]) -> Grid:
        """The same geometry for other heads."""
        return replace(self, heads=tuple(heads))

    @cached_property
    def one_head(self) -> Grid:
        """The geometry of the first head, with its tensors on the CPU: for what is counted."""
        return replace(self, heads=self.heads[:1], device=torch.device("cpu"))

    @cached_property
    def allowed_blocks(self) -> int:
        """Blocks of one head that may be kept."""
        return int(self.one_head.allowed.sum())

    @property
    def num_q_blocks(self) -> int:
        return num_blocks(self.q_len, self.q_block_size)

    @property
    def num_kv_blocks(self) -> int:
        return num_blocks(self.kv_len, self.kv_block_size)

    @property
    def num_rows(self) -> int:
        return len(self.heads) * self.num_q_blocks

    # ---- (num_rows,) int64 each --------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Tensor:
        return torch.arange(self.num_rows, device=self.device)

    @cached_property
    def head(self) -> Tensor:
        return torch.tensor(self.heads, dtype=torch.int64, device=self.device).repeat_interleave(self.num_q_blocks)

    @cached_property
    def q_block(self) -> Tensor:
        return self.rows % self.num_q_blocks

    @cached_property
    def first_token(self) -> Tensor:
        return self.q_block * self.q_block_size

    @cached_property
    def last_token(self) -> Tensor:
        return (self.first_token + self.q_block_size - 1).clamp(max=self.q_len - 1)

    @cached_property
    def first_unit(self) -> Tensor:
        return self.first_token // self.kv_block_size

    @cached_property
    def last_unit(self) -> Tensor:
        return self.last_token // self.kv_block_size

    @cached_property
    def first(self) -> Tensor:
        """First column of the diagonal."""
        return self.first_unit.clamp(max=self.num_kv_blocks - 1)

    @cached_property
    def last(self) -> Tensor:
        """Last column of the diagonal."""
        return self.last_unit.clamp(max=self.num_kv_blocks - 1)

    @cached_property
    def width(self) -> Tensor:
        """Columns of the diagonal."""
        return self.last - self.first + 1

    @cached_property
    def allowed(self) -> Tensor:
        """Columns 0 .. allowed - 1 may be kept."""
        return self.last + 1 if self.causal else torch.full_like(self.rows, self.num_kv_blocks)

    # ---- blocks: pairs (row, column), (n,) int64 each ----------------------------------------------------------

    def runs(self, row: Tensor, first: Tensor, last: Tensor, step: int = 1) -> tuple[Tensor, Tensor]:
        """The columns ``first, first + step, ... <= last`` of each listed row, as far as the row may keep them."""
        first = first + step * (-(first // step)).clamp(min=0)
        last = torch.minimum(last, self.allowed[row] - 1)
        index, rank = ragged(((last - first) // step + 1).clamp(min=0))
        return row[index], first[index] + rank * step

    def token_runs(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The columns that hold a key of each row's inclusive token range; first, last (num_rows,) int64."""
        first = torch.where(first < self.kv_len, first.clamp(min=0) // self.kv_block_size, self.num_kv_blocks)
        last = torch.where(last >= 0, last // self.kv_block_size, -1)
        return self.runs(self.rows, first, last)

    @cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        """Every row with each of its units."""
        index, rank = ragged(self.last_unit - self.first_unit + 1)
        return index, self.first_unit[index] + rank

    @cached_property
    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Every row with each column of its diagonal."""
        return self.runs(self.rows, self.first, self.last)

    # ---- layouts -----------------------------------------------------------------------------------------------

    def layout(self, row: Tensor, col: Tensor) -> BlockLayout:
        """The layout of any blocks, repeats and columns out of reach included, and the diagonal."""
        key = self._distinct(row, col)
        return self._layout(self._counts(key), key % self.num_kv_blocks)

    def counts(self, row: Tensor, col: Tensor) -> Tensor:
        """(num_rows,) int64: columns that each row of that layout keeps."""
        return self._counts(self._distinct(row, col))

    def _distinct(self, row: Tensor, col: Tensor) -> Tensor:
        row, col = (torch.cat(parts) for parts in zip((row, col), self.diagonal, strict=True))
        seen = (col >= 0) & (col < self.allowed[row])
        return torch.unique(row[seen] * self.num_kv_blocks + col[seen])

    def _counts(self, key: Tensor) -> Tensor:
        return torch.bincount(key // self.num_kv_blocks, minlength=self.num_rows)

    def layout_of_rows(self, counts: Tensor, col: Tensor) -> BlockLayout:
        """The layout that keeps ``counts`` (num_rows,) distinct columns a row, listed row after row in any order."""
        narrow = torch.int32 if self.num_rows * self.num_kv_blocks < 2**31 else torch.int64  # sorts in half the time
        row = torch.repeat_interleave(self.rows.to(narrow), counts, output_size=len(col))
        return self._layout(counts, (row * self.num_kv_blocks + col.to(narrow)).sort().values % self.num_kv_blocks)

    def _layout(self, counts: Tensor, col: Tensor) -> BlockLayout:
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        begin = torch.arange(len(self.heads), device=self.device)[:, None] * self.num_q_blocks
        crow = ends[begin + torch.arange(self.num_q_blocks + 1, device=self.device)]
        sizes = (self.q_len, self.kv_len, self.q_block_size, self.kv_block_size)
        return BlockLayout(crow, col.to(torch.int32), *sizes, self.causal).trusted()


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(counts.sum(),) int64 each: index i repeated ``counts[i]`` times, and 0 .. counts[i] - 1 beside it."""
    index = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    begin = counts.cumsum(0) - counts
    return index, torch.arange(len(index), device=counts.device) - begin[index]
