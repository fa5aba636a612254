"""ring_block_mass: how much of its rows' attention each kept block holds, where the sequence is split across ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.catalog import build
from raybsa.kernels.call import compute_dtype
from raybsa.kernels.mass import block_mass
from raybsa.ring.attention import Ring, all_segments, rows_of
from raybsa.ring.plan import RingPlan


@torch.no_grad()
def ring_block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: RingPlan,
    communicator: Communicator,
    *,
    scale: float,
    segment_ids: Tensor | None = None,
    block_bias: Tensor | None = None,
    sharpness: float = 1.0,
) -> Tensor:
    """(nnz,) in the compute dtype, for the blocks of ``plan.of_rank(rank).layout``: as ``block_mass``.

    Keys come round once more, in the place of values too. Call it after ``ring_attention`` with the same arguments.
    A KV block lies on one rank, so that powers may be taken rank by rank.

    Args:
        q: (B, H, S, D) this rank's tokens.
        k: (B, Hkv, S, D) the same tokens'.
        lse: (B, H, S) what ``ring_attention`` returned.
    """
    segments = None if segment_ids is None else all_segments(segment_ids, plan, communicator)
    ring = Ring(
        plan, communicator, tuple(k.shape), k.element_size(), scale, segments, segment_ids, 0.0, None, False,
        build("none"), {}, "blocked",
    )  # fmt: skip
    mass = torch.zeros(ring.mine.layout.nnz_blocks, dtype=compute_dtype(q.dtype), device=q.device)
    for hop, keys, values in ring.arriving(k, k):
        if len(hop.q_blocks):
            call = ring.call(hop, rows_of(q, hop, 2), keys, values, block_bias)
            mass.index_add_(0, hop.bias_index, block_mass(call, rows_of(lse, hop, 2), sharpness))
    return mass
