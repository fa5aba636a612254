"""Layouts known only at run time: each rank chose the blocks of its own query rows; the ring needs them all."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.layout import BlockLayout
from raybsa.ring.partition import Partition


def gather_layout(own: BlockLayout, partition: Partition, communicator: Communicator) -> BlockLayout:
    """The whole layout from every rank's rows; O(nnz) integers travel. The same on every rank.

    ``RingPlan.of_rank(rank).layout`` lists the blocks in ``own``'s order, so a ``block_bias`` of ``own`` fits as it is.

    Args:
        own: the rows of this rank's query blocks (``q_block_ids`` are its blocks of the partition) against all KV
            blocks (``kv_block_ids`` None), e.g. one group for each sample and head.

    Raises:
        ValueError: rows of other blocks than the partition deals this rank, or ranks that differ in geometry.
    """
    mine = partition.blocks(communicator.rank, own.q_block_size).to(own.device)
    held = own.q_block_ids
    problem = None
    if own.kv_block_ids is not None or held is None or not torch.equal(held, mine):
        problem = f"rank {communicator.rank} must give the rows of its {len(mine)} query blocks against all KV blocks"
    shape = (own.q_len, own.kv_len, own.q_block_size, own.kv_block_size, own.causal, own.num_groups)
    communicator.agree("a layout's rows", problem or f"partition {partition.digest()}, geometry and groups {shape}")
    if problem is not None:
        raise ValueError(problem)
    group, row, col = own.coordinates()
    blocks = torch.stack([group, mine[row], col]).to(torch.int32)
    group, row, col = torch.cat(_gather_columns(blocks, communicator), 1).long().unbind(0)
    return BlockLayout.from_blocks(
        group,
        row,
        col,
        num_groups=own.num_groups,
        q_len=own.q_len,
        kv_len=own.kv_len,
        q_block_size=own.q_block_size,
        kv_block_size=own.kv_block_size,
        causal=own.causal,
    )


def _gather_columns(blocks: Tensor, communicator: Communicator) -> list[Tensor]:
    """Every rank's (3, n) int32; n differs by rank."""
    count = torch.tensor([blocks.shape[1]], device=blocks.device)
    counts = [int(n) for n in communicator.all_gather("layout", count)]
    padded = blocks.new_zeros(3, max(counts))
    padded[:, : blocks.shape[1]] = blocks
    parts = communicator.all_gather("layout", padded)
    return [part[:, :n] for part, n in zip(parts, counts, strict=True)]
