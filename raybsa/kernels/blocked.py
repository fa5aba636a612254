"""Block-sparse attention in plain torch operations, forward and backward, on any device; O(nnz) work.

For each chunk of query-block rows: gather their KV blocks, one batched product for the scores, softmax, one product
for the output. The backward makes the weights again (FlashAttention, 2205.14135, algorithm 4) and adds each block's dK
and dV where it came from. Beyond inputs, outputs and gradients the workspace is bounded at any length (see
``chunks``). 16-bit inputs are computed, and their gradients summed, in float32.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from raybsa.kernels import node
from raybsa.kernels.call import AttentionCall, compute_dtype
from raybsa.kernels.chunks import plan_chunks
from raybsa.kernels.delta import row_delta
from raybsa.kernels.gather import BlockTable
from raybsa.kernels.merge import merge
from raybsa.kernels.scores import ChunkScores, four_dims, scaled_product, take_rows

INF = float("inf")


def why_not(call: AttentionCall) -> str | None:
    """Blocked serves every call."""
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out (B, H, Sq, D) in q's dtype, and lse (B, H, Sq) in the compute dtype if the call wants it."""
    return node.run(call, sys.modules[__name__])


def gradients(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """As ``node.run`` asks for them. Rows that are at hand whole are normalised anew: where a mask hides all their keys
    by a finite number (HF's ``finfo.min``) their lse is too large to hold the logarithm of how many these are."""
    if all(chunk.whole for chunk in plan_chunks(call).chunks):
        lse = None
    sums = _Backward(call, wanted, lse, row_delta(out, grad_out, grad_lse), grad_out).run()
    like = (call.q, call.k, call.v, call.attn_mask, call.block_bias)
    return tuple(None if x is None or t is None else x.to(t.dtype) for x, t in zip(sums, like, strict=True))


def backward(
    call: AttentionCall, lse: Tensor, delta: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``attention_backward`` says: the weights are ``exp(score - lse)``, whatever keys made that lse."""
    q, k, v, _, bias = _Backward(call, (False, call.block_bias is not None), lse, delta, grad_out).run()
    return q, k, v, bias


def forward(call: AttentionCall, for_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
    """As ``run``, without a node; its gradient needs no lse where the call wants none."""
    plan, tables, dtype = plan_chunks(call), _Tables(call), compute_dtype(call.q.dtype)
    batch, heads, tokens, head_dim = call.q.shape
    rows = (batch * heads * call.layout.num_q_blocks, call.layout.q_block_size)
    split = any(not chunk.whole for chunk in plan.chunks)
    out = call.q.new_empty(*rows, head_dim, dtype=dtype if split else call.q.dtype)
    lse = call.q.new_full(rows, -INF, dtype=dtype) if split or call.return_lse else None
    if not plan.covers_rows:
        out.zero_()
    for chunk in plan.chunks:
        at = ChunkScores(call, chunk, plan.columns)
        queries, keys, values = tables.take(at)
        weights, chunk_lse = _softmax(at.scores(queries, keys), at.may_hide_rows, lse is not None)
        if call.dropout_p:
            weights *= at.dropout_factor()
        if chunk.span and lse is None and out.dtype == dtype:
            torch.bmm(weights, values, out=out[chunk.span])
            continue
        chunk_out = torch.bmm(weights, values)
        if lse is not None and chunk_lse is not None:
            if chunk.first:
                chunk_out, chunk_lse = merge(out[chunk.row], lse[chunk.row], chunk_out, chunk_lse)
            lse.index_copy_(0, chunk.row, chunk_lse)
        out.index_copy_(0, chunk.row, chunk_out.to(out.dtype))
    out = out.view(batch, heads, -1, head_dim)[:, :, :tokens]
    return out.to(call.q.dtype), None if lse is None else lse.view(batch, heads, -1)[:, :, :tokens]


class _Tables:
    """q, k and v as tables of blocks, taken in the compute dtype."""

    def __init__(self, call: AttentionCall) -> None:
        self.dtype = compute_dtype(call.q.dtype)
        self.q = BlockTable.of(call.q, call.layout.q_block_size)
        self.k, self.v = (BlockTable.of(x, call.layout.kv_block_size) for x in (call.k, call.v))

    def take(self, at: ChunkScores) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (C, bq, D), keys and values (C, m * bk, D)."""
        count, kv_head = len(at.chunk.row), at.chunk.kv_head
        index = self.k.index(kv_head, at.kv_block)
        keys = self.k.take(index, count, self.dtype)
        if self.k.steps != self.v.steps:
            index = self.v.index(kv_head, at.kv_block)
        values = self.v.take(index, count, self.dtype)
        return take_rows(self.q, at, self.dtype), keys, values


def _softmax(scores: Tensor, may_hide_rows: bool, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Turns scores into weights in place, 0 in rows that see nothing, and gives lse (C, bq) if wanted.

    With m the largest score of a row and w the largest weight, ``w = exp(m - lse)``, so ``lse = m - log(w)``.
    """
    top = scores.amax(-1, keepdim=True) if may_hide_rows or with_lse else None
    weights = torch.softmax(scores, -1, out=scores)
    lse = None if top is None or not with_lse else top - weights.amax(-1, keepdim=True).log_()
    if may_hide_rows and top is not None:
        blind = top == -INF
        weights.masked_fill_(blind, 0.0)
        lse = None if lse is None else lse.masked_fill_(blind, -INF)
    return weights, None if lse is None else lse.squeeze(-1)


class _Backward:
    """Gradients of one call, summed chunk by chunk in the compute dtype. ``wanted``: those of attn_mask, block_bias."""

    def __init__(
        self, call: AttentionCall, wanted: tuple[bool, ...], lse: Tensor | None, delta: Tensor, grad_out: Tensor
    ) -> None:
        layout, dtype = call.layout, compute_dtype(call.q.dtype)
        batch, heads, _, head_dim = call.q.shape
        self.call, self.dtype = call, dtype
        self.tables = _Tables(call)
        self.grad_out = BlockTable.of(grad_out, layout.q_block_size)
        self.delta = BlockTable.of(delta[..., None], layout.q_block_size)
        self.lse = None if lse is None else BlockTable.of(lse[..., None], layout.q_block_size)
        self.grad_q = call.q.new_zeros(batch * heads * layout.num_q_blocks, layout.q_block_size, head_dim, dtype=dtype)
        kv_shape = (batch * call.k.shape[1] * layout.num_kv_blocks, layout.kv_block_size * head_dim)
        self.grad_k, self.grad_v = (call.k.new_zeros(kv_shape, dtype=dtype) for _ in range(2))
        self.grad_mask, self.grad_bias = (
            torch.zeros_like(x, dtype=dtype) if x is not None and want else None
            for x, want in zip((call.attn_mask, call.block_bias), wanted, strict=True)
        )

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of q, k, v, attn_mask and block_bias."""
        plan, call = plan_chunks(self.call), self.call
        for chunk in plan.chunks:
            self._add(ChunkScores(call, chunk, plan.columns))
        grads = (_tokens(grad, x) for grad, x in ((self.grad_q, call.q), (self.grad_k, call.k), (self.grad_v, call.v)))
        return (*grads, self.grad_mask, self.grad_bias)  # type: ignore[return-value]

    def _add(self, at: ChunkScores) -> None:
        chunk = at.chunk
        queries, keys, values = self.tables.take(at)
        weights = self._weights(at, at.scores(queries, keys))
        grad_out = at.without_padding(self._take(self.grad_out, at))
        grad_weights = torch.bmm(grad_out, values.transpose(1, 2))
        dropped = weights
        if self.call.dropout_p:
            factor = at.dropout_factor()
            dropped = weights * factor
            grad_weights *= factor
        self._add_blocks(self.grad_v, at.flat_kv_block, torch.bmm(dropped.transpose(1, 2), grad_out))
        grad_scores = grad_weights.sub_(at.without_padding(self._take(self.delta, at))).mul_(weights)
        scale = self.call.scale
        self._add_blocks(self.grad_k, at.flat_kv_block, scaled_product(grad_scores.transpose(1, 2), queries, scale))
        self.grad_q.index_add_(0, chunk.row, scaled_product(grad_scores, keys, scale))
        if self.grad_bias is not None:
            sums = grad_scores.view(len(chunk.row), -1, chunk.width, self.call.layout.kv_block_size).sum((1, 3))
            self._add_blocks(self.grad_bias, at.slots.view(-1), sums)
        if self.grad_mask is not None:
            index = tuple(x.expand(grad_scores.shape) for x in at.mask_index)
            four_dims(self.grad_mask).index_put_(index, grad_scores, accumulate=True)

    def _weights(self, at: ChunkScores, scores: Tensor) -> Tensor:
        """The forward's weights: by the rows' lse where there is one, else softmax over the whole rows at hand."""
        if self.lse is None:
            return _softmax(scores, at.may_hide_rows, with_lse=False)[0]
        lse = self._take(self.lse, at)
        return scores.sub_(lse.masked_fill(lse == -INF, INF)).exp_()

    def _take(self, table: BlockTable, at: ChunkScores) -> Tensor:
        return take_rows(table, at, self.dtype)

    def _add_blocks(self, target: Tensor, index: Tensor, source: Tensor) -> None:
        """``target[index] += source``, repeats summed; in a fixed order if asked for (CUDA's index_add has none)."""
        source = source.reshape(len(index), *target.shape[1:])
        if self.call.deterministic and target.is_cuda:
            target.index_put_((index,), source, accumulate=True)
        else:
            target.index_add_(0, index, source)


def _tokens(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient summed by padded blocks in the shape of ``like`` (B, H, S, D)."""
    batch, heads, tokens, head_dim = like.shape
    return grad.view(batch, heads, -1, head_dim)[:, :, :tokens]
