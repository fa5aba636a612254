"""Distillation: the gate learns where the attention is. After SeerAttention (2410.13276) and DeepSeek-V3.2's indexer.

The target is the attention's own mass, block by block: exact over all candidates for a few sampled rows, and over the
kept blocks of all rows where the layout is sparse. Forced blocks carry no choice and are left out: what is compared is
how the rest of each row's mass is divided, weighted by how much that rest is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raybsa.counter import Stream, hash_u32
from raybsa.kernels.api import run_call
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.mass import block_mass
from raybsa.layout import BlockLayout
from raybsa.selectors.entries import Entries
from raybsa.selectors.rules import Rules


def divergence(scores: Tensor, mass: Tensor, entries: Entries, rules: Rules) -> tuple[Tensor, Tensor]:
    """(), () KL(mass || softmax of scores) in nats over the rows' blocks that are not forced, summed with these blocks'
    mass as the rows' weight, and the sum of the weights: their quotient is the mean.

    Args:
        scores: (nnz,) of the entries, over the temperature; differentiable.
        mass: (nnz,) attention of the entries, not differentiated.
    """
    free = rules.forced_rank(entries.q_block, entries.kv_block, entries.layout.num_kv_blocks) < 0
    mass = (mass * free).to(scores.dtype).detach()
    rows = entries.layout.num_groups * entries.layout.num_q_blocks
    share = mass / mass.new_zeros(rows).index_add_(0, entries.row, mass).clamp(min=1e-20)[entries.row]
    gap = torch.xlogy(share, share) - share * entries.log_softmax(scores, free)
    weight = mass.new_zeros(rows).index_add_(0, entries.row, mass)[entries.row]
    return (weight * gap).sum(), mass.sum().clamp(min=1e-20)


def sampled_rows(num_rows: int, count: int, seed: int) -> Tensor:
    """(count,) int64 on the CPU, ascending: one row drawn in each of ``count`` equal stretches."""
    count = min(count, num_rows)
    edges = torch.arange(count + 1) * num_rows // count
    drawn = hash_u32(seed, Stream.TASK, torch.arange(count)) % edges.diff()
    return edges[:-1] + drawn


def dense_mass(call: AttentionCall, layout: BlockLayout) -> Tensor:
    """(nnz,) true attention mass of all blocks of a few rows, whatever ``call`` itself kept.

    Args:
        call: the attention; its layout says nothing here.
        layout: every candidate of some rows (``q_block_ids``), ``B * H`` groups.
    """
    size = layout.q_block_size
    assert layout.q_block_ids is not None
    tokens = (layout.q_block_ids[:, None] * size + torch.arange(size, device=layout.device)).flatten()
    tokens = tokens[tokens < layout.q_len]
    mask, segments = call.attn_mask, call.segment_ids
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., tokens, :]
    if segments is not None:
        segments = (segments[0][:, tokens], segments[1])
    rows = replace(
        call,
        q=call.q[:, :, tokens],
        layout=layout,
        attn_mask=mask,
        segment_ids=segments,
        block_bias=None,
        dropout_p=0.0,
        return_lse=True,
    )
    with torch.no_grad():
        return block_mass(rows, run_call(rows)[1])
