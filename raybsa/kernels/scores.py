"""ChunkScores: the masked scores of one chunk, made the same way in the forward and again in the backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raybsa.counter import Stream, uniform
from raybsa.kernels.call import AttentionCall, compute_dtype
from raybsa.kernels.chunks import Chunk
from raybsa.kernels.gather import BlockTable


@dataclass(frozen=True, eq=False)
class ChunkScores:
    """Where a chunk's tokens are and what hides them. Shapes: C rows of bq queries, m blocks of bk keys each.

    Args:
        call: the whole call.
        chunk: the rows and the part of them at hand.
        columns: as in ``ChunkPlan``.
    """

    call: AttentionCall
    chunk: Chunk
    columns: Tensor

    @cached_property
    def slots(self) -> Tensor:
        """(C, m) places in the layout's ``col_indices``."""
        return self.chunk.start[:, None] + torch.arange(self.chunk.width, device=self.columns.device)

    @cached_property
    def kv_block(self) -> Tensor:
        """(C, m) KV blocks at hand."""
        return self.columns[self.slots]

    @property
    def flat_kv_block(self) -> Tensor:
        """(C * m,) ``kv_head * num_kv_blocks + block``: where dK and dV are added."""
        return (self.kv_block + (self.chunk.kv_head * self.call.layout.num_kv_blocks)[:, None]).view(-1)

    @cached_property
    def batch(self) -> Tensor:
        """(C,) the sample of each row."""
        return self.chunk.head // self.call.q.shape[1]

    @cached_property
    def q_token(self) -> Tensor:
        """(C, bq) tokens at hand; the padding of a ragged last block repeats its last token."""
        layout = self.call.layout
        return _tokens(self.chunk.q_block, layout.q_block_size, layout.q_tokens)

    @cached_property
    def kv_token(self) -> Tensor:
        """(C, m * bk) tokens at hand, padded likewise."""
        layout = self.call.layout
        return _tokens(self.kv_block, layout.kv_block_size, layout.kv_tokens).view(len(self.chunk.row), -1)

    def position(self, blocks: Tensor, starts: Tensor, size: int) -> Tensor:
        """(..., size) global positions of the tokens of ``blocks``, padding included."""
        return starts[blocks][..., None] + torch.arange(size, device=blocks.device)

    @cached_property
    def q_position(self) -> Tensor:
        """(C, bq)"""
        return self.position(self.chunk.q_block, self.call.layout.q_block_starts, self.call.layout.q_block_size)

    @property
    def may_hide_rows(self) -> bool:
        """Whether some query may see none of the chunk's keys."""
        call = self.call
        return bool(self.chunk.cut) or any(x is not None for x in (call.segment_ids, call.attn_mask, call.block_bias))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(C, bq, m * bk) of ``queries`` (C, bq, D) and ``keys`` (C, m * bk, D), scaled; hidden pairs are -inf."""
        scores = scaled_product(queries, keys.transpose(1, 2), self.call.scale)
        if self.call.block_bias is not None:
            bias = self.call.block_bias[self.slots].to(scores.dtype)
            self._by_block(scores).add_(bias[:, None, :, None])
        if self.call.attn_mask is not None:
            mask = four_dims(self.call.attn_mask)[self.mask_index]
            scores = scores.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else scores.add_(mask)
        if self.call.segment_ids is not None:
            q_ids, kv_ids = self.call.segment_ids
            same = (
                q_ids[self.batch[:, None], self.q_token][:, :, None]
                == kv_ids[self.batch[:, None], self.kv_token][:, None]
            )
            scores.masked_fill_(~same, float("-inf"))
        for place in self.chunk.cut:
            self._by_block(scores)[:, :, place].masked_fill_(self._cut_away(place), float("-inf"))
        return scores

    @cached_property
    def mask_index(self) -> tuple[Tensor, ...]:
        """Index of each (C, bq, m * bk) pair into ``attn_mask`` in four dimensions; it broadcasts to that shape, as the
        mask's dimensions of size 1 are never expanded."""
        assert self.call.attn_mask is not None
        full = (
            self.batch[:, None, None],
            (self.chunk.head % self.call.q.shape[1])[:, None, None],
            self.q_token[:, :, None],
            self.kv_token[:, None, :],
        )
        shape = four_dims(self.call.attn_mask).shape
        return tuple(index if size > 1 else index.new_zeros(1, 1, 1) for index, size in zip(full, shape, strict=True))

    def dropout_factor(self) -> Tensor:
        """(C, bq, m * bk): 0 where dropout drops the weight, else ``1 / (1 - p)``."""
        layout, p, seed = self.call.layout, self.call.dropout_p, self.call.seed
        assert seed is not None
        columns = self.position(self.kv_block, layout.kv_block_starts, layout.kv_block_size)
        head = self.chunk.head[:, None, None]
        numbers = uniform(seed, Stream.DROPOUT, head, self.q_position[:, :, None], columns.view(len(head), 1, -1))
        return (numbers >= p).to(compute_dtype(self.call.q.dtype)) / (1.0 - p)

    def without_padding(self, x: Tensor) -> Tensor:
        """``x`` (C, bq, n) with the padding of a ragged last query block set to 0."""
        layout = self.call.layout
        if layout.q_tokens == layout.num_q_blocks * layout.q_block_size:
            return x
        return x.masked_fill((self.q_position >= layout.q_len)[:, :, None], 0.0)

    def _by_block(self, scores: Tensor) -> Tensor:
        return scores.view(*scores.shape[:2], self.chunk.width, -1)

    def _cut_away(self, place: int) -> Tensor:
        """(C, bq, bk) bool: what causality and the ragged end hide of each row's block at ``place``."""
        layout = self.call.layout
        keys = self.position(self.kv_block[:, place], layout.kv_block_starts, layout.kv_block_size)
        hidden = (keys >= layout.kv_len)[:, None, :]
        return hidden | (keys[:, None, :] > self.q_position[:, :, None]) if layout.causal else hidden


def four_dims(mask: Tensor) -> Tensor:
    """A mask that broadcasts to (B, H, Sq, Skv), with all four dimensions."""
    return mask[(None,) * (4 - mask.dim())]


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale * a @ b`` of two batches of matrices, in one operation."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0.0, alpha=scale)


def take_rows(table: BlockTable, at: ChunkScores, dtype: torch.dtype) -> Tensor:
    """(C, bq, n) in ``dtype``: the chunk's query blocks. May be a view: not to be written to."""
    chunk = at.chunk
    if chunk.span and table.blocks is not None:
        return table.blocks[chunk.span].to(dtype)
    return table.take(table.index(chunk.head, chunk.q_block[:, None]), len(chunk.row), dtype)


def _tokens(blocks: Tensor, size: int, tokens: int) -> Tensor:
    """(..., size) token indices of ``blocks`` (...), held within ``0 .. tokens - 1``."""
    index = blocks[..., None] * size + torch.arange(size, device=blocks.device)
    return index.clamp_(max=tokens - 1) if tokens % size else index
