"""Shape: the part of a selected layout that no data changes, made once for a geometry and density.

Every row's number of blocks is known beforehand, so offsets and places are, and a selection fills in columns alone:
nothing is counted, and on a GPU nothing is read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from raybsa.aside import aside
from raybsa.layout import BlockLayout
from raybsa.selectors.rules import Rules

_DENSE_BLOCK = 128
_LITTLE = 1e-9  # a density: one block a row


@dataclass(frozen=True, eq=False)
class Shape:
    """Rows of blocks and how many each keeps. n rows; m is the sum of ``counts``.

    Args:
        rules: what may be kept.
        q_len, kv_len: tokens of the whole sequence.
        rows: (n,) int64 global numbers of the query blocks at hand.
        counts: (n,) int64 blocks that each keeps.
        widest: the largest of them.
        begin: (n + 1,) int64 offsets of the rows.
        row: (m,) int64 the place among ``rows`` of every kept block.
        flat: (m,) int64 its place in (n, widest).
        is_whole: the rows are all of the sequence.
    """

    rules: Rules
    q_len: int
    kv_len: int
    rows: Tensor
    counts: Tensor
    widest: int
    begin: Tensor
    row: Tensor
    flat: Tensor
    is_whole: bool
    _crow: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def make(
        cls,
        rules: Rules,
        q_len: int,
        kv_len: int,
        density: float,
        device: torch.device | str,
        rows: Tensor | None = None,
    ) -> Shape:
        """The shape at a density; ``rows`` are global numbers of query blocks, None: all of them."""
        size = rules.block_size
        num_rows = -(-q_len // size)
        here = torch.arange(num_rows) if rows is None else rows.cpu()
        counts = rules.budget(here, num_rows, -(-kv_len // size), density)
        begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row = torch.repeat_interleave(torch.arange(len(here)), counts)
        widest = int(counts.max()) if len(counts) else 0
        flat = row * widest + torch.arange(len(row)) - begin[row]
        tensors = (x.to(device) for x in (here, counts, begin, row, flat))
        here, counts, begin, row, flat = tensors
        return cls(rules, q_len, kv_len, here, counts, widest, begin, row, flat, rows is None)

    @property
    def columns(self) -> int:
        """KV blocks of the whole sequence."""
        return -(-self.kv_len // self.rules.block_size)

    @property
    def kept(self) -> Tensor:
        """(n, widest) bool: which of a row's choices, in order of preference, are its ``counts`` first."""
        return torch.arange(self.widest, device=self.counts.device) < self.counts[:, None]

    def columns_of(self, best: Tensor) -> Tensor:
        """(B * groups, m) int32 of ``best`` (B, groups, n, widest), columns in order of preference: of each row its
        ``counts`` first ones, ascending."""
        chosen = torch.where(self.kept, best.flatten(0, 1), self.columns)
        return chosen.sort(-1).values.flatten(1)[:, self.flat].to(torch.int32)

    def layout(self, col: Tensor, copies: int = 1, transient: bool = True) -> BlockLayout:
        """The layout of the columns ``col`` (groups, m), every group ``copies`` times in a row."""
        offsets = self._offsets(len(col) * copies)
        return self._layout(offsets, col[:, None].expand(-1, copies, -1).flatten(), transient)

    def capped_layout(self, best: Tensor, wanted: Tensor, copies: int = 1) -> BlockLayout:
        """As ``layout``, of the choices that are ``wanted`` (B, groups, n, widest) too. Reads sizes back."""
        kept = (self.kept & wanted).flatten(0, 1).repeat_interleave(copies, 0)
        chosen = torch.where(kept, best.flatten(0, 1).repeat_interleave(copies, 0), self.columns)
        col = chosen.sort(-1).values.flatten()
        ends = kept.sum(-1).flatten().cumsum(0)
        begin = torch.cat([ends.new_zeros(1), ends])
        first = torch.arange(len(kept), device=col.device)[:, None] * len(self.rows)
        crow = begin[first + torch.arange(len(self.rows) + 1, device=col.device)]
        return self._layout(crow, col[col < self.columns], True)

    def everything(self, groups: int = 1) -> BlockLayout:
        """The layout that keeps every candidate: what dense attention is within the rules."""
        found = [self.rules.candidates(rows, self.columns) for rows in self.rows.split(max(1, 2**22 // self.columns))]
        counts = torch.cat([x.sum(1) for x in found])
        begin = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        col = torch.cat([x.nonzero()[:, 1] for x in found])
        first = torch.arange(groups, device=col.device)[:, None] * len(col)
        return self._layout(first + begin, col.repeat(groups), False)

    def _offsets(self, groups: int) -> Tensor:
        """(groups, n + 1) int64, one tensor for all calls: a GPU's plan of the rows goes with it."""
        if groups not in self._crow:
            with torch.inference_mode(False):  # a later training step must be able to use it
                first = torch.arange(groups, device=self.begin.device)[:, None] * len(self.row)
                self._crow[groups] = first + self.begin
        return self._crow[groups]

    @cached_property
    def dense(self) -> BlockLayout:
        """The attention of ``everything``, for all rows and heads alike; in blocks of at least 128 tokens where no
        segment needs finer ones: the same tokens in fewer pieces."""
        with torch.inference_mode(False):  # a later training step must be able to use it
            if self.rules.segments is not None or not self.is_whole:
                return self.everything()
            size = max(self.rules.block_size, _DENSE_BLOCK)
            return dense_layout(self.q_len, self.kv_len, self.rules.causal, self.rows.device, size)

    def nearest(self) -> BlockLayout:
        """One group of as many blocks a row as a selection has, those nearest to the diagonal: what is known of its
        work before there is data."""
        step = max(1, 2**20 // self.columns)
        best = [self._nearest(rows) for rows in self.rows.split(step)]
        return self.layout(self.columns_of(torch.cat(best)[None, None]), transient=False)

    def _nearest(self, rows: Tensor) -> Tensor:
        columns = torch.arange(self.columns, device=rows.device)
        distance = (columns - self.rules.diagonal(rows, self.columns)[:, None]).abs()
        return torch.topk(self.rules.preferences(-distance.float(), rows), self.widest).indices

    def _layout(self, crow: Tensor, col: Tensor, transient: bool) -> BlockLayout:
        size, ids = self.rules.block_size, None if self.is_whole else self.rows
        sizes = (self.q_len, self.kv_len, size, size, self.rules.causal)
        return BlockLayout(crow, col.to(torch.int32), *sizes, ids, transient=transient).trusted()


@lru_cache(maxsize=16)
def dense_layout(
    q_len: int, kv_len: int, causal: bool, device: torch.device, block_size: int = _DENSE_BLOCK
) -> BlockLayout:
    """One group that keeps every block that causality allows."""
    with aside():
        return Shape.make(Rules(block_size, causal, sinks=0), q_len, kv_len, _LITTLE, device).everything()
