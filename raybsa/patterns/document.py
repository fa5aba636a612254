"""Document: tokens see their own document in a packed sequence, as when training on packed documents; see Krell et al.
2021, arXiv:2107.02027."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.patterns.grid import Grid
from raybsa.patterns.parameters import integers
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.ranking import Slots, evenly


@dataclass(frozen=True)
class Document(Pattern):
    """Tokens see one another iff they lie in one document. Blocks that two documents share are kept: give
    ``segment_ids`` to the attention for a cut that is exact to the token.

    The documents are what they are: a density sets how many evenly spread blocks of its document a row keeps, the same
    number in all rows as far as their documents hold so many. A density beyond all documents adds evenly spread blocks
    of the rest that a row may see, equally many in all rows. Odd blocks go to evenly spread rows.

    Args:
        lengths: tokens of the documents in order; they repeat until the sequence is covered.
    """

    lengths: tuple[int, ...] = (1024, 512, 2048, 512)
    family: ClassVar[str] = "document"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", integers("lengths", self.lengths))

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        return grid.token_runs(self._begin(grid.first_token), self._end(grid.last_token) - 1)

    def own(self, grid: Grid) -> Tensor:
        low, high = self._columns(grid)
        return high - low + 1

    def order(self, slots: Slots) -> Tensor:
        low, high = (ends[slots.row] for ends in self._columns(slots.grid))
        free = slots.budget[slots.row] - slots.width
        own = evenly(low, high, (slots.first, slots.last), slots.rank, free)
        past = high - low + 1 - slots.width
        begin, end = torch.zeros_like(low), slots.allowed - 1
        return torch.where(own >= 0, own, evenly(begin, end, (low, high), slots.rank - past, free - past))

    def _columns(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """(num_rows,) int64 each: the first and the last column of every row's document."""
        low = self._begin(grid.first_token) // grid.kv_block_size
        high = (self._end(grid.last_token) - 1) // grid.kv_block_size
        return torch.minimum(low, grid.first), torch.minimum(high, grid.allowed - 1)

    def _begin(self, token: Tensor) -> Tensor:
        """First token of each token's document."""
        ends, number = self._find(token)
        return token // ends[-1] * ends[-1] + torch.where(number > 0, ends[(number - 1).clamp(min=0)], 0)

    def _end(self, token: Tensor) -> Tensor:
        """First token after each token's document."""
        ends, number = self._find(token)
        return token // ends[-1] * ends[-1] + ends[number]

    def _find(self, token: Tensor) -> tuple[Tensor, Tensor]:
        ends = torch.tensor(self.lengths, dtype=torch.int64, device=token.device).cumsum(0)
        return ends, torch.searchsorted(ends, token % ends[-1], right=True)
