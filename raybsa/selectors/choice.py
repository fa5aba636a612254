"""Choice: what one selection keeps and by what, and what its scores can give back to the task or learn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.layout import BlockLayout
from raybsa.selectors.distill import divergence
from raybsa.selectors.entries import Entries, Table
from raybsa.selectors.gate import cooled
from raybsa.selectors.selection import best_columns, kept_columns, within_share
from raybsa.selectors.shape import Shape
from raybsa.selectors.visibility import Visibility


@dataclass(frozen=True, eq=False)
class Choice:
    """One choice of all samples and heads.

    Args:
        u, w: (B, Hkv, rows, d) and (B, Hkv, columns, d); block scores are ``u @ w.T``.
        shape: which rows, and how many blocks each keeps at most.
        by_kv_head: the blocks kept, a group for each sample and KV head.
        layout: the same for each sample and head. Both are of one group where everything is kept and none is apart.
        visible: what the rows may look at; None: all.
    """

    u: Tensor
    w: Tensor
    shape: Shape
    by_kv_head: BlockLayout
    layout: BlockLayout
    visible: Visibility | None = None

    @classmethod
    def of_all(
        cls, u: Tensor, w: Tensor, shape: Shape, copies: int, visible: Visibility | None = None, *, apart: bool
    ) -> Choice:
        """Every candidate.

        Args:
            copies: query heads of a KV head.
            apart: with groups of their own, though they are alike.
        """
        groups = u.shape[0] * u.shape[1]
        by_kv_head = shape.everything(groups) if apart else shape.dense
        layout = shape.everything(groups * copies) if apart and copies > 1 else by_kv_head
        return cls(u, w, shape, by_kv_head, layout, visible)

    @classmethod
    def of_best(
        cls,
        u: Tensor,
        w: Tensor,
        shape: Shape,
        copies: int,
        top_p: float | None,
        temperature: float,
        visible: Visibility | None = None,
    ) -> Choice:
        """Of each row what must be kept and the best scores; with ``top_p`` as in ``within_share``."""
        if top_p is None:
            col = kept_columns(u, w, shape, visible)
            by_kv_head = shape.layout(col)
            layout = by_kv_head if copies == 1 else shape.layout(col, copies)
        else:
            best = best_columns(u, w, shape, visible)
            wanted = within_share(u, w, shape, best, top_p, temperature, visible)
            by_kv_head = shape.capped_layout(best, wanted)
            layout = by_kv_head if copies == 1 else shape.capped_layout(best, wanted, copies)
        return cls(u, w, shape, by_kv_head, layout, visible)

    @property
    def copies(self) -> int:
        """Query heads of a KV head; 1 where one group serves all."""
        return self.layout.num_groups // self.by_kv_head.num_groups

    def bias(self, temperature: float) -> Tensor:
        """(nnz,) of ``layout``: log of each kept block's gate; 0 on the diagonal, which holds a causal row's own
        future."""
        entries = Entries.of(self.by_kv_head)
        scores = entries.scores(self.u, self.w)
        if (visible := self.visible) is not None:
            judged, _ = visible.at(entries.group, entries.place, entries.columns, self.u.shape[1])
            scores = torch.where(judged, scores, entries.scores(visible.of_place(self.u), visible.of_place(self.w)))
        gate = F.logsigmoid(cooled(scores, temperature))
        own = self.shape.rules.diagonal(entries.q_block, self.shape.columns) == self.by_kv_head.col_indices
        return entries.over_heads(gate.masked_fill(own, 0.0), self.copies)

    def divergence(self, mass: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """``divergence`` over the kept blocks, from their mass (nnz of ``layout``,)."""
        table = Table.of(self.by_kv_head, self.shape.widest)
        columns = table.take(self.by_kv_head.col_indices)
        scores = table.scores(self.u, self.w, columns)
        settled = table.beyond | self.shape.rules.settled(table.q_block, columns, self.shape.columns)
        if (visible := self.visible) is not None:
            judged, hidden = visible.at(table.group, table.row, columns.long(), self.u.shape[1])
            by_place = table.scores(visible.of_place(self.u), visible.of_place(self.w), columns)
            scores, settled = torch.where(judged, scores, by_place), settled | hidden
        mass = Table.of(self.layout, self.shape.widest).take(mass)
        if self.copies > 1:
            mass = mass.unflatten(0, (-1, self.copies)).mean(1)
        return divergence(cooled(scores, temperature), mass, settled)
