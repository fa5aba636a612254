"""A layout's rows or columns as padded lists, the format of other libraries: as wide as the longest list.

O(nnz) to make, but one global row makes all lists as wide as the sequence: that is the format's price, not ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Lists:
    """The blocks of each row, batch and head.

    Args:
        counts: (B, H, rows) int32.
        indices: (B, H, rows, longest) int32, ascending, 0 past a row's count.
        shortest, longest: the least and the most blocks of a row.
    """

    counts: Tensor
    indices: Tensor
    shortest: int
    longest: int

    @property
    def uniform(self) -> bool:
        """Whether every row has as many blocks, and one at least."""
        return 0 < self.shortest == self.longest


def row_lists(layout: BlockLayout, batch: int, heads: int) -> Lists:
    """The KV blocks of every query block."""
    counts = layout.row_counts.reshape(-1)
    shortest, longest = torch.stack(torch.aminmax(counts)).tolist()
    every = torch.arange(len(counts), device=layout.device)
    row = torch.repeat_interleave(every, counts, output_size=layout.nnz_blocks)
    place = torch.arange(layout.nnz_blocks, device=layout.device) - (counts.cumsum(0) - counts)[row]
    indices = torch.zeros(len(counts), max(longest, 1), dtype=torch.int32, device=layout.device)
    indices[row, place] = layout.col_indices
    shape = {1: (1, 1), heads: (1, heads)}.get(layout.num_groups, (batch, heads))
    size = layout.num_q_blocks
    wide = counts.to(torch.int32).view(*shape, size).expand(batch, heads, size).contiguous()
    return Lists(wide, indices.view(*shape, size, -1).expand(batch, heads, size, -1).contiguous(), shortest, longest)


def column_lists(layout: BlockLayout, batch: int, heads: int) -> Lists:
    """The query blocks that see each KV block."""
    return row_lists(layout.transpose(), batch, heads)
