"""The whole attention of a few rows of blocks, as dense products: for so few rows that is less work than a layout."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.kernels.call import compute_dtype
from raybsa.selectors.rules import Rules

TILE_SCORES = {"cpu": 2**20, "cuda": 2**24}  # scores of pairs of tokens at hand at one time


@torch.no_grad()
def row_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    rules: Rules,
    rows: Tensor,
    attn_mask: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    counted: Tensor | None = None,
    sharpness: float = 1.0,
) -> Tensor:
    """(B, Hkv, R, columns) in the compute dtype: the attention that each block holds of all the candidates of a row, to
    the power of ``sharpness``, summed over the row's queries, mean over the query heads of a KV head.

    Args:
        q, k: (B, H, Sq, D) and (B, Hkv, Skv, D), the whole sequence's.
        scale: factor on the scores.
        rules: the candidates.
        rows: (R,) int64 numbers of query blocks, ascending, where q is.
        attn_mask, segment_ids: as ``block_sparse_attention`` takes them.
        counted: (b, g, Sq) bool, b being B or 1 and g Hkv or 1: the queries whose attention counts; None: all.
        sharpness: the power of a query's attention of a block: at 1 every query counts alike; above 1 those count more
            that look at few blocks.
    """
    size, kv_len = rules.block_size, k.shape[2]
    tokens = torch.add(torch.arange(size, device=q.device), rows[:, None], alpha=size).flatten()
    columns = -(-kv_len // size)
    mass = q.new_zeros(*k.shape[:2], len(rows), columns, dtype=compute_dtype(q.dtype))
    with torch.autocast(q.device.type, enabled=False):
        keys = k.to(mass.dtype).transpose(-1, -2)[:, :, None]
        for part, width in _tiles(len(tokens), size, q.shape[0] * q.shape[1] * kv_len, q.device):
            at = tokens[part].clamp(max=q.shape[2] - 1)
            queries = q.index_select(2, at).to(mass.dtype).unflatten(1, (k.shape[1], -1))
            scores = _masked((queries * scale) @ keys, at, rules, attn_mask, segment_ids)
            weights = scores.softmax(-1)
            if attn_mask is not None or segment_ids is not None:
                weights = weights.nan_to_num_(0.0)  # of queries that see nothing
            if counted is not None:
                weights *= counted[:, :, None, at, None]
            if q.shape[2] % size:
                weights *= (tokens[part] < q.shape[2])[:, None]
            blocks = F.pad(weights, (0, -kv_len % size)) if kv_len % size else weights
            held = blocks.unflatten(-1, (columns, size)).sum(-1)
            held = held if sharpness == 1.0 else held.pow_(sharpness)
            sums = held.unflatten(3, (-1, width)).sum((2, 4))
            mass[:, :, part.start // size : -(-part.stop // size)] += sums
    copies = q.shape[1] // k.shape[1]
    return mass if copies == 1 else mass / copies


def _tiles(tokens: int, size: int, scores: int, device: torch.device) -> Iterator[tuple[slice, int]]:
    """Places among the rows' tokens, whole rows or equal parts of one, and how many tokens of a row they hold.

    Args:
        tokens: of all rows.
        size: of a row, a power of two.
        scores: of a token.
    """
    step = max(1, TILE_SCORES.get(device.type, 2**24) // scores)
    width = min(size, 1 << (step.bit_length() - 1))
    span = max(width, step // size * size)
    for begin in range(0, tokens, span):
        yield slice(begin, min(begin + span, tokens)), width


def _masked(
    scores: Tensor, at: Tensor, rules: Rules, attn_mask: Tensor | None, segment_ids: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The scores (B, Hkv, copies, t, Skv) of the queries ``at`` (t,), -inf where they may not look."""
    length, infinity = scores.shape[-1], float("-inf")
    if rules.segments is not None:
        found = rules.candidates(at // rules.block_size, -(-length // rules.block_size))
        scores = scores.masked_fill(~found.repeat_interleave(rules.block_size, 1)[:, :length], infinity)
    if rules.causal:
        scores = scores.masked_fill(torch.arange(length, device=at.device) > at[:, None], infinity)
    if segment_ids is not None:
        of_queries, of_keys = segment_ids
        apart = of_queries.index_select(1, at)[:, :, None] != of_keys[:, None]
        scores = scores.masked_fill(apart[:, None, None], infinity)
    if attn_mask is None:
        return scores
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    mask = mask if mask.shape[2] == 1 else mask.index_select(2, at)
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, scores.shape[1:3])
    return scores.masked_fill(~mask, infinity) if mask.dtype == torch.bool else scores + mask
