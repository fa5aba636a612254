"""TokenTable: a (B, H, S, D) tensor as rows of D numbers, gathered by token without copying the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTable:
    """Rows of D numbers, and how (batch, head, token) finds its row.

    Args:
        rows: (n, D); row ``b * batch_step + h * head_step + t * token_step`` is token t of head h in sample b.
    """

    rows: Tensor
    batch_step: int
    head_step: int
    token_step: int

    @classmethod
    def of(cls, x: Tensor) -> TokenTable:
        """The table of ``x`` (B, H, S, D). A view for every layout whose tokens' numbers lie together in memory,
        (B, S, H, D) transposed and slices of a fused projection among them; else a contiguous copy."""
        head_dim = x.shape[-1]
        aligned = x.stride(-1) == 1 and all(step % head_dim == 0 for step in x.stride()[:3])
        if not aligned:
            x = x.contiguous()
        batch_step, head_step, token_step = (step // head_dim for step in x.stride()[:3])
        last = (x.shape[0] - 1) * batch_step + (x.shape[1] - 1) * head_step + (x.shape[2] - 1) * token_step
        rows = x.as_strided((last + 1, head_dim), (head_dim, 1), x.storage_offset())
        return cls(rows, batch_step, head_step, token_step)

    def index(self, batch: Tensor, head: Tensor, token: Tensor) -> Tensor:
        """(C * L,) rows of tokens ``token`` (C, L) of heads ``head`` (C,) in samples ``batch`` (C,)."""
        base = batch * self.batch_step + head * self.head_step
        return (base[:, None] + (token if self.token_step == 1 else token * self.token_step)).view(-1)

    def same_rows(self, other: TokenTable) -> bool:
        """Whether one index serves both tables."""
        return (self.batch_step, self.head_step, self.token_step) == (
            other.batch_step,
            other.head_step,
            other.token_step,
        )

    def take(self, index: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """(C, length, D) in ``dtype``: the rows at ``index`` (C * length,)."""
        return self.rows.index_select(0, index).view(-1, length, self.rows.shape[1]).to(dtype)
