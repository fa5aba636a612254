"""Distillation: the gate learns where the attention is. After SeerAttention (2410.13276) and DeepSeek-V3.2's indexer.

The target is the attention's own mass, block by block, over all candidates of a few sampled rows; over ranks, over the
kept blocks of all rows. A query's share of a block is taken to a power first (``sharpness``): a row of blocks chooses
for all its queries, and a query that looks at one block loses more without it than one that looks at many. Blocks that
are forced carry no choice and are left out: what is compared is how the rest of each row's mass is divided, weighted by
how much that rest is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raybsa.counter import Stream, mix_words
from raybsa.selectors.gate import cooled
from raybsa.selectors.row_mass import row_mass
from raybsa.selectors.rules import Rules
from raybsa.selectors.selection import settled_blocks
from raybsa.selectors.visibility import Visibility


def divergence(scores: Tensor, mass: Tensor, settled: Tensor) -> tuple[Tensor, Tensor]:
    """(), () KL(mass || softmax of scores) in nats over the rows' blocks that are not settled, summed with these
    blocks' mass as the rows' weight, and the sum of the weights: their quotient is the mean.

    Args:
        scores: (..., columns) of each row's blocks, over the temperature; differentiable.
        mass: (..., columns) attention of the blocks, not differentiated.
        settled: bool, broadcasts to the same: blocks about which the row has no choice.
    """
    found: tuple[Tensor, Tensor] = _Divergence.apply(scores, mass, settled)
    return found


class _Divergence(torch.autograd.Function):
    """Its gradient is at hand in the forward: a row's weight times the gate's share, less the mass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mass: Tensor, settled: Tensor) -> tuple[Tensor, Tensor]:
        logs = scores.masked_fill(settled, torch.finfo(scores.dtype).min).log_softmax(-1)
        mass = mass.to(scores.dtype).masked_fill(settled, 0.0)
        weight = mass.sum(-1, keepdim=True)
        gap = torch.xlogy(mass, mass / weight.clamp(min=1e-20)) - mass * logs
        ctx.save_for_backward(logs.exp_().mul_(weight).sub_(mass))
        total = weight.sum().clamp(min=1e-20)
        ctx.mark_non_differentiable(total)
        return gap.sum(), total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (of_scores,) = ctx.saved_tensors
        return grad * of_scores, None, None


def rows_divergence(
    u: Tensor,
    w: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float,
    rules: Rules,
    rows: Tensor,
    temperature: float,
    attn_mask: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    visible: Visibility | None = None,
    sharpness: float = 1.0,
) -> Tensor:
    """() nats: the mean divergence of a few rows over all their candidates.

    Args:
        u, w: (B, Hkv, num_q_blocks, d) and (B, Hkv, columns, d); block scores are ``u @ w.T``.
        q, k, scale, rules, rows, attn_mask, segment_ids, sharpness: as ``row_mass`` takes them.
        temperature: of the scores.
        visible: what the rows of the masks may look at; None: all.
    """
    counted = None if visible is None else visible.counted
    mass = row_mass(q, k, scale, rules, rows, attn_mask, segment_ids, counted, sharpness)
    settled = settled_blocks(rules, rows, w.shape[2])
    with torch.autocast(u.device.type, enabled=False):
        u = u.index_select(2, rows)
        scores = u @ w.transpose(-1, -2)
        if visible is not None:
            scores, hidden = visible.scores(scores, u, w, rows)
            settled = settled | hidden
    found, weight = divergence(cooled(scores, temperature), mass, settled)
    return found / weight


def sampled_rows(num_rows: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int64, ascending: one row drawn in each of ``count`` equal stretches, the same on every device."""
    count = min(count, num_rows)
    edges = [i * num_rows // count for i in range(count + 1)]
    drawn = [mix_words(seed, int(Stream.TASK), i) for i in range(count)]
    rows = torch.tensor([edges[i] + drawn[i] % (edges[i + 1] - edges[i]) for i in range(count)])
    return rows.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else rows
