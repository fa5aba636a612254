"""The kept blocks of a layout with a group for each sample and KV head, and the gate's score of each: as a list in
storage order, or as a table of equal rows. What follows from the offsets of the rows is made once for all layouts that
share them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.kernels.kept import kept_with_rows
from raybsa.layout import BlockLayout


@dataclass(frozen=True, eq=False)
class Entries:
    """The list.

    Args:
        layout: ``batch * Hkv`` groups.
        row: (nnz,) int64 flat row ``group * num_q_blocks + place``.
        q_block: (nnz,) int64 global number.
        first: (nnz,) int64 flat number ``group * num_kv_blocks`` of the group's first KV block.
    """

    layout: BlockLayout
    row: Tensor
    q_block: Tensor
    first: Tensor

    @classmethod
    def of(cls, layout: BlockLayout) -> Entries:
        known = kept_with_rows(layout)
        if ("entries",) not in known:
            with torch.inference_mode(False):  # a later training step must be able to use it
                group, row, _ = layout.coordinates()
                number = row if layout.q_block_ids is None else layout.q_block_ids[row]
                known["entries",] = group * layout.num_q_blocks + row, number, group * layout.num_kv_blocks
        return cls(layout, *known["entries",])

    @property
    def group(self) -> Tensor:
        """(nnz,) int64 flat KV head."""
        return self.first // self.layout.num_kv_blocks

    @property
    def place(self) -> Tensor:
        """(nnz,) int64 place of the row among the layout's."""
        return self.row % self.layout.num_q_blocks

    @property
    def columns(self) -> Tensor:
        """(nnz,) int64 KV block."""
        return self.layout.col_indices.long()

    def scores(self, u: Tensor, w: Tensor) -> Tensor:
        """(nnz,) products of u (B, Hkv, rows, d) and w (B, Hkv, columns, d); differentiable."""
        of_rows = u.flatten(0, 2).index_select(0, self.row)
        return (of_rows * w.flatten(0, 2).index_select(0, self.first + self.layout.col_indices)).sum(-1)

    def over_heads(self, values: Tensor, copies: int) -> Tensor:
        """(nnz * copies,): ``values`` (nnz,) in the order of ``layout.repeat_heads(copies)``; differentiable."""
        if copies == 1:
            return values
        known = kept_with_rows(self.layout)
        if ("source", copies) not in known:
            with torch.inference_mode(False):
                known["source", copies] = self._source(copies)
        return values.index_select(0, known["source", copies])

    def _source(self, copies: int) -> Tensor:
        """(nnz * copies,) int64: the entry behind each entry of ``layout.repeat_heads(copies)``."""
        crow = self.layout.crow_indices
        group = torch.arange(self.layout.num_groups, device=crow.device).repeat_interleave(copies)
        counts = (crow[:, -1] - crow[:, 0])[group]
        size = len(self.row) * copies
        of = torch.repeat_interleave(torch.arange(len(group), device=crow.device), counts, output_size=size)
        before = counts.cumsum(0) - counts
        return crow[group[of], 0] + torch.arange(size, device=crow.device) - before[of]


@dataclass(frozen=True, eq=False)
class Table:
    """The kept blocks of every row side by side, as many places as the widest row has.

    Args:
        layout: any number of groups G.
        place: (G * rows * width,) int64 places in storage order; any one where the row is shorter.
        beyond: (G, rows, width) bool: where it is.
        first: (G, 1, 1) int64 flat number ``group * num_kv_blocks`` of the group's first KV block.
        q_block: (rows, 1) int64 global number.
    """

    layout: BlockLayout
    place: Tensor
    beyond: Tensor
    first: Tensor
    q_block: Tensor

    @classmethod
    def of(cls, layout: BlockLayout, width: int) -> Table:
        """``width``: of the widest row at least."""
        known = kept_with_rows(layout)
        if ("table", width) not in known:
            with torch.inference_mode(False):
                known["table", width] = _table(layout, width)
        return cls(layout, *known["table", width])

    @property
    def group(self) -> Tensor:
        """(G, 1, 1) int64."""
        return torch.arange(self.layout.num_groups, device=self.layout.device)[:, None, None]

    @property
    def row(self) -> Tensor:
        """(rows, 1) int64 place of the row among the layout's."""
        return torch.arange(self.layout.num_q_blocks, device=self.layout.device)[:, None]

    def take(self, values: Tensor) -> Tensor:
        """(G, rows, width) of ``values`` (nnz,)."""
        return values.index_select(0, self.place).view(self.beyond.shape)

    def scores(self, u: Tensor, w: Tensor, columns: Tensor) -> Tensor:
        """(G, rows, width) products of u (B, Hkv, rows, d) and w (B, Hkv, columns, d); differentiable.

        Args:
            columns: (G, rows, width), what ``take`` makes of the layout's.
        """
        found = w.flatten(0, 2).index_select(0, (self.first + columns).flatten()).view(*columns.shape, -1)
        return (found @ u.flatten(0, 1)[..., None])[..., 0]


def _table(layout: BlockLayout, width: int) -> tuple[Tensor, ...]:
    crow, device = layout.crow_indices, layout.device
    place = crow[:, :-1, None] + torch.arange(width, device=device)
    beyond = place >= crow[:, 1:, None]
    first = torch.arange(layout.num_groups, device=device)[:, None, None] * layout.num_kv_blocks
    rows = torch.arange(layout.num_q_blocks, device=device) if layout.q_block_ids is None else layout.q_block_ids
    return place.clamp(max=max(0, layout.nnz_blocks - 1)).flatten(), beyond, first, rows[:, None]
