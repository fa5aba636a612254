"""Block-sparse attention composed of torch's own operations, which torch differentiates in every way and any number of
times: forward-mode and second derivatives, for which no kernel of ours exists.

O(nnz) like every backend, but all scores of the kept blocks are in memory at one time. Nothing is written in place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.aside import aside
from raybsa.counter import Stream, uniform
from raybsa.kernels.call import AttentionCall, compute_dtype
from raybsa.kernels.kept import kept_with
from raybsa.layout import BlockLayout

INF = float("inf")
_INPUTS = ("q", "k", "v", "attn_mask", "block_bias")


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out (B, H, Sq, D) in q's dtype and lse (B, H, Sq) in the compute dtype."""
    pairs, dtype, layout = _pairs(call), compute_dtype(call.q.dtype), call.layout
    batch, heads, tokens, _ = call.q.shape
    scores = _scores(call, pairs, dtype)
    top = _largest(scores.detach(), pairs)  # of any constant the result is the same
    weights = torch.exp(scores - top.index_select(0, pairs.row)[..., None])
    total = _summed(weights.sum(-1), pairs)
    if call.dropout_p:
        weights = weights * _dropout_factor(call, pairs, dtype)
    values = _blocks(call.v.to(dtype), layout.kv_block_size).index_select(0, pairs.kv_row)
    blind = total == 0
    safe = torch.where(blind, 1.0, total)
    out = _summed(weights @ values, pairs) / safe[..., None]
    lse = torch.where(blind, -INF, torch.log(safe) + top)
    padded = (batch, heads, layout.num_q_blocks * layout.q_block_size)
    return out.reshape(*padded, -1)[:, :, :tokens].to(call.q.dtype), lse.reshape(padded)[:, :, :tokens]


def gradients(call: AttentionCall, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, attn_mask and block_bias, differentiable; None for one that is not there or not float."""
    names, tensors = _floats(call)

    def attend(*given: Tensor) -> tuple[Tensor, Tensor]:
        return run(_with(call, names, given))

    (_, lse), pull = torch.func.vjp(attend, *tensors)  # type: ignore[misc]
    found = dict(zip(names, pull((grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse)), strict=True))
    return tuple(found.get(name) for name in _INPUTS)


def second_gradients(
    call: AttentionCall, grad_out: Tensor, grad_lse: Tensor | None, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of grad_out, grad_lse and ``gradients``' inputs, from ``grads`` of what ``gradients`` returns."""
    names, tensors = _floats(call)
    given = (grad_out,) if grad_lse is None else (grad_out, grad_lse)

    def differentiate(*every: Tensor) -> tuple[Tensor, ...]:
        of_out, of_lse = every[0], None if grad_lse is None else every[1]
        found = gradients(_with(call, names, every[len(given) :]), of_out, of_lse)
        return tuple(x for x in found if x is not None)

    results, pull = torch.func.vjp(differentiate, *given, *tensors)  # type: ignore[misc]
    wanted = [grad for name, grad in zip(_INPUTS, grads, strict=True) if name in names]
    back = pull(tuple(torch.zeros_like(x) if g is None else g for x, g in zip(results, wanted, strict=True)))
    found = dict(zip(names, back[len(given) :], strict=True))
    of_lse = None if grad_lse is None else back[1]
    return (back[0], of_lse, *(found.get(name) for name in _INPUTS))


def _floats(call: AttentionCall) -> tuple[list[str], list[Tensor]]:
    """The inputs that have gradients, by name."""
    given = {name: getattr(call, name) for name in _INPUTS}
    floats = {name: x for name, x in given.items() if x is not None and x.is_floating_point()}
    return list(floats), list(floats.values())


def _with(call: AttentionCall, names: list[str], tensors: Any) -> AttentionCall:
    changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return replace(call, **changes)


# ---- pairs of blocks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Every kept block of every sample and head. E of them; all tensors are (E,) int64.

    Args:
        rows: how many rows of blocks there are in all.
        row, kv_row: ``(b * H + h) * num_q_blocks + i`` and ``(b * Hkv + h // (H // Hkv)) * num_kv_blocks + j``.
        sample, head, q_block, kv_block: b, ``b * H + h``, i and j.
        slot: the place in the layout's storage order.
    """

    rows: int
    row: Tensor
    kv_row: Tensor
    sample: Tensor
    head: Tensor
    q_block: Tensor
    kv_block: Tensor
    slot: Tensor


def _pairs(call: AttentionCall) -> _Pairs:
    batch, heads = call.q.shape[:2]
    kept, key = kept_with(call.layout), ("pairs", batch, heads, call.queries_per_kv)
    if key not in kept:
        with aside():
            kept[key] = _make_pairs(call.layout, batch, heads, call.queries_per_kv)
    found = kept[key]
    assert isinstance(found, _Pairs)
    return found


def _make_pairs(layout: BlockLayout, batch: int, heads: int, queries_per_kv: int) -> _Pairs:
    group, q_block, kv_block = layout.coordinates()
    slot = torch.arange(len(group), device=layout.device)
    copies = batch * heads // layout.num_groups
    copy = torch.arange(copies, device=layout.device).repeat_interleave(len(group))
    group, q_block, kv_block, slot = (x.repeat(copies) for x in (group, q_block, kv_block, slot))
    head = copy * layout.num_groups + group
    kv_row = head // queries_per_kv * layout.num_kv_blocks + kv_block
    row = head * layout.num_q_blocks + q_block
    return _Pairs(batch * heads * layout.num_q_blocks, row, kv_row, head // heads, head, q_block, kv_block, slot)


def _scores(call: AttentionCall, pairs: _Pairs, dtype: torch.dtype) -> Tensor:
    """(E, bq, bk): scaled, biased, -inf where a query does not see a key."""
    layout = call.layout
    queries = _blocks(call.q.to(dtype), layout.q_block_size).index_select(0, pairs.row)
    keys = _blocks(call.k.to(dtype), layout.kv_block_size).index_select(0, pairs.kv_row)
    scores = queries @ keys.transpose(-1, -2) * call.scale
    if call.block_bias is not None:
        scores = scores + call.block_bias.to(dtype).index_select(0, pairs.slot)[:, None, None]
    q_token = _tokens(pairs.q_block, layout.q_block_size, layout.q_tokens)
    kv_token = _tokens(pairs.kv_block, layout.kv_block_size, layout.kv_tokens)
    if call.attn_mask is not None:
        mask = _of_pairs(call, call.attn_mask, pairs, q_token, kv_token)
        scores = torch.where(mask, scores, -INF) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if call.segment_ids is not None:
        of_queries, of_keys = call.segment_ids
        sample = pairs.sample[:, None]
        same = of_queries[sample, q_token][:, :, None] == of_keys[sample, kv_token][:, None]
        scores = torch.where(same, scores, -INF)
    return torch.where(_hidden(layout, pairs), -INF, scores)


def _of_pairs(call: AttentionCall, mask: Tensor, pairs: _Pairs, q_token: Tensor, kv_token: Tensor) -> Tensor:
    """(E, bq, bk) of a mask that broadcasts to (B, H, Sq, Skv)."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    heads = call.q.shape[1]
    full = (
        pairs.sample[:, None, None],
        (pairs.head % heads)[:, None, None],
        q_token[:, :, None],
        kv_token[:, None],
    )
    index = tuple(at if size > 1 else torch.zeros_like(at) for at, size in zip(full, mask.shape, strict=True))
    return mask[index]


def _hidden(layout: BlockLayout, pairs: _Pairs) -> Tensor:
    """(E, bq or 1, bk) bool: what causality and the ragged end hide."""
    keys = _positions(layout.kv_block_starts, pairs.kv_block, layout.kv_block_size)[:, None]
    hidden = keys >= layout.kv_len
    if not layout.causal:
        return hidden
    return hidden | (keys > _positions(layout.q_block_starts, pairs.q_block, layout.q_block_size)[:, :, None])


def _dropout_factor(call: AttentionCall, pairs: _Pairs, dtype: torch.dtype) -> Tensor:
    """(E, bq, bk): 0 where dropout drops the weight, else ``1 / (1 - p)``."""
    assert call.seed is not None
    layout = call.layout
    rows = _positions(layout.q_block_starts, pairs.q_block, layout.q_block_size)[:, :, None]
    columns = _positions(layout.kv_block_starts, pairs.kv_block, layout.kv_block_size)[:, None]
    numbers = uniform(call.seed, Stream.DROPOUT, pairs.head[:, None, None], rows, columns)
    return (numbers >= call.dropout_p).to(dtype) / (1.0 - call.dropout_p)


def _blocks(x: Tensor, size: int) -> Tensor:
    """(B * H * n, size, D) of (B, H, S, D), the ragged last block filled with zeros."""
    rest = -x.shape[2] % size
    padded = F.pad(x, (0, 0, 0, rest)) if rest else x
    return padded.reshape(-1, size, x.shape[3])


def _tokens(blocks: Tensor, size: int, tokens: int) -> Tensor:
    """(E, size) tokens at hand of blocks (E,); what lies beyond the last repeats it."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).clamp(max=tokens - 1)


def _positions(starts: Tensor, blocks: Tensor, size: int) -> Tensor:
    """(E, size) global positions of the tokens of blocks (E,)."""
    return starts.index_select(0, blocks)[:, None] + torch.arange(size, device=blocks.device)


def _largest(scores: Tensor, pairs: _Pairs) -> Tensor:
    """(rows, bq): the largest score of each query, 0 where it sees nothing."""
    of_pairs = scores.amax(-1)
    lowest = torch.full((pairs.rows, of_pairs.shape[1]), -INF, dtype=scores.dtype, device=scores.device)
    top = lowest.scatter_reduce(0, pairs.row[:, None].expand(-1, of_pairs.shape[1]), of_pairs, "amax")
    return torch.where(top == -INF, 0.0, top)


def _summed(of_pairs: Tensor, pairs: _Pairs) -> Tensor:
    """(rows, ...): the sums over each row's pairs of (E, ...)."""
    zeros = torch.zeros((pairs.rows, *of_pairs.shape[1:]), dtype=of_pairs.dtype, device=of_pairs.device)
    return zeros.index_add(0, pairs.row, of_pairs)
