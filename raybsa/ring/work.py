"""Work: what each rank computes and receives in each hop. All that a cost can follow from, exact from a RingPlan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from raybsa.ring.plan import RingPlan


@dataclass(frozen=True, eq=False)
class Work:
    """Counts of blocks for every hop and rank; O(world_size²) numbers, whatever the sequence's length.

    Args:
        seq_len: tokens of the whole sequence.
        q_block_size, kv_block_size: tokens of a block.
        shifts: (hops,) int, the hops that happen, 0 (the rank's own blocks) first.
        active: (hops, world_size) kept (query block, KV block) pairs of one query head, the heads' mean.
        rows: (hops, world_size) query blocks that a hop computes: those with a kept pair in any head.
        received: (hops, world_size) KV blocks that arrive, of one KV head, the heads' mean; nothing in hop 0.
        owned: (world_size,) query blocks of each rank.
    """

    seq_len: int
    q_block_size: int
    kv_block_size: int
    shifts: np.ndarray
    active: np.ndarray
    rows: np.ndarray
    received: np.ndarray
    owned: np.ndarray

    @property
    def world_size(self) -> int:
        return self.active.shape[1]

    @cached_property
    def imbalance(self) -> float:
        """max / mean of the ranks' active blocks; 1 where there is no work."""
        each = self.active.sum(0)
        return float(each.max() / each.mean()) if each.any() else 1.0

    @cached_property
    def sent(self) -> np.ndarray:
        """(hops, world_size) KV blocks that each rank sends: what the rank ``shift`` further on receives."""
        return np.stack([np.roll(row, -shift) for row, shift in zip(self.received, self.shifts, strict=True)])


def work_of(plan: RingPlan) -> Work:
    """The plan's own numbers, counted in O(nnz + num_q_blocks × world_size)."""
    layout, world = plan.layout, plan.world_size
    row = torch.repeat_interleave(
        torch.arange(layout.num_q_blocks).repeat(layout.num_groups), layout.row_counts.cpu().view(-1)
    )
    source = plan.kv_owner[layout.col_indices.cpu().long()]
    pairs = torch.bincount(plan.q_owner[row] * world + source, minlength=world * world).view(world, world)
    touched = torch.zeros(layout.num_q_blocks, world, dtype=torch.bool)
    touched[row, source] = True
    rows = torch.zeros(world, world, dtype=torch.int64).index_add_(0, plan.q_owner, touched.long())
    return from_pairs(
        (layout.q_len, layout.q_block_size, layout.kv_block_size),
        np.array([0, *plan.shifts]),
        pairs.double().numpy() / layout.num_groups,
        rows.double().numpy(),
        plan.traffic.double().numpy() / plan.kv_groups,
        torch.bincount(plan.q_owner, minlength=world).double().numpy(),
    )


def from_pairs(
    sizes: tuple[int, int, int],
    shifts: np.ndarray,
    active: np.ndarray,
    rows: np.ndarray,
    needed: np.ndarray,
    owned: np.ndarray,
) -> Work:
    """Work of (seq_len, q_block_size, kv_block_size) from (world_size, world_size) counts: the row's rank computes on,
    or needs, blocks of the column's."""
    received = by_shift(needed, shifts)
    received[0] = 0
    return Work(*sizes, shifts, by_shift(active, shifts), by_shift(rows, shifts), received, owned)


def by_shift(pairs: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """(hops, world_size) from (world_size, world_size): in hop h rank r meets the blocks of rank ``r - shifts[h]``."""
    ranks = np.arange(pairs.shape[0])
    return pairs[ranks, (ranks - shifts[:, None]) % len(ranks)]
