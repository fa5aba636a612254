"""BlockTable: a (B, H, S, D) tensor as rows of D numbers, gathered by blocks of tokens without copying it whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockTable:
    """Rows of D numbers, and how (head, block) finds its rows. Heads are flat here: ``b * H + h``.

    Args:
        rows: (n, D).
        heads: (B * H,) int64: the row of each head's first token.
        steps: how many rows lie between samples, heads and tokens.
        tokens: S.
        offsets: (block_size,) int64: how many rows each token of a block lies behind its first.
        blocks: (B * H * num_blocks, block_size, D), a view where the tensor is contiguous and ends with a whole block.
    """

    rows: Tensor
    heads: Tensor
    steps: tuple[int, int, int]
    tokens: int
    offsets: Tensor
    blocks: Tensor | None

    @classmethod
    def of(cls, x: Tensor, block_size: int) -> BlockTable:
        """The table of ``x`` (B, H, S, D). A view for every layout whose tokens' numbers lie together in memory,
        (B, S, H, D) transposed and slices of a fused projection among them; else a contiguous copy."""
        head_dim = x.shape[-1]
        if x.stride(-1) != 1 or any(step % head_dim for step in x.stride()[:3]):
            x = x.contiguous()
        batch_step, head_step, token_step = (step // head_dim for step in x.stride()[:3])
        steps = (batch_step, head_step, token_step)
        batch, head = (torch.arange(n, device=x.device) for n in x.shape[:2])
        heads = (batch[:, None] * batch_step + head * head_step).view(-1)
        last = sum((n - 1) * step for n, step in zip(x.shape[:3], steps, strict=True))
        rows = x.as_strided((last + 1, head_dim), (head_dim, 1), x.storage_offset())
        whole = x.is_contiguous() and x.shape[2] % block_size == 0
        blocks = x.view(-1, block_size, head_dim) if whole else None
        return cls(rows, heads, steps, x.shape[2], torch.arange(block_size, device=x.device) * token_step, blocks)

    def index(self, head: Tensor, block: Tensor) -> Tensor:
        """(C * m * block_size,) rows of blocks ``block`` (C, m) of heads ``head`` (C,); padding repeats the last."""
        size, token_step = len(self.offsets), self.steps[2]
        base, first = self.heads[head], block * (size * token_step)
        if self.tokens % size == 0:
            return ((first + base[:, None])[:, :, None] + self.offsets).view(-1)
        inside = (first[:, :, None] + self.offsets).clamp_(max=(self.tokens - 1) * token_step)
        return inside.add_(base[:, None, None]).view(-1)

    def take(self, index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """(count, tokens, D) in ``dtype``: the rows at ``index`` in ``count`` equal parts."""
        return self.rows.index_select(0, index).view(count, -1, self.rows.shape[1]).to(dtype)
