"""Entries: the kept blocks of a layout as a list, with the gate's score of each; and softmax over the rows' entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Entries:
    """The kept blocks of a layout with a group for each sample and KV head, in storage order.

    Args:
        layout: ``batch * Hkv`` groups.
        row: (nnz,) int64 flat row ``group * num_q_blocks + place``.
        q_block, kv_block: (nnz,) int64 global numbers.
        kv_row: (nnz,) int64 flat row ``group * num_kv_blocks + kv_block``.
    """

    layout: BlockLayout
    row: Tensor
    q_block: Tensor
    kv_block: Tensor
    kv_row: Tensor

    @classmethod
    def of(cls, layout: BlockLayout) -> Entries:
        group, row, col = layout.coordinates()
        number = row if layout.q_block_ids is None else layout.q_block_ids[row]
        return cls(layout, group * layout.num_q_blocks + row, number, col, group * layout.num_kv_blocks + col)

    def scores(self, u: Tensor, w: Tensor) -> Tensor:
        """(nnz,) products of u (B, Hkv, rows, d) and w (B, Hkv, columns, d); differentiable."""
        return (u.flatten(0, 2)[self.row] * w.flatten(0, 2)[self.kv_row]).sum(-1)

    def over_heads(self, values: Tensor, copies: int) -> Tensor:
        """(nnz * copies,): ``values`` (nnz,) in the order of ``layout.repeat_heads(copies)``; differentiable."""
        return values if copies == 1 else values[self._source(copies)]

    def mean_of_heads(self, values: Tensor, copies: int) -> Tensor:
        """(nnz,): the mean of ``values`` (nnz * copies,) over the heads that share an entry."""
        if copies == 1:
            return values
        sums = values.new_zeros(len(self.row)).index_add_(0, self._source(copies), values)
        return sums / copies

    def log_softmax(self, scores: Tensor, counted: Tensor) -> Tensor:
        """(nnz,) log of each counted entry's share of its row; 0 for entries that do not count."""
        rows = self.layout.num_groups * self.layout.num_q_blocks
        lowest = torch.finfo(scores.dtype).min
        top = scores.new_full((rows,), lowest)
        top = top.scatter_reduce(0, self.row, scores.detach().masked_fill(~counted, lowest), "amax")[self.row]
        shifted = torch.where(counted, scores - top, 0.0)
        sums = scores.new_zeros(rows).index_add(0, self.row, shifted.exp() * counted)
        return torch.where(counted, shifted - sums.clamp(min=torch.finfo(sums.dtype).tiny).log()[self.row], 0.0)

    def _source(self, copies: int) -> Tensor:
        """(nnz * copies,) int64: the entry behind each entry of ``layout.repeat_heads(copies)``."""
        crow = self.layout.crow_indices
        group = torch.arange(self.layout.num_groups, device=crow.device).repeat_interleave(copies)
        counts = (crow[:, -1] - crow[:, 0])[group]
        size = len(self.row) * copies
        of = torch.repeat_interleave(torch.arange(len(group), device=crow.device), counts, output_size=size)
        before = counts.cumsum(0) - counts
        return crow[group[of], 0] + torch.arange(size, device=crow.device) - before[of]
