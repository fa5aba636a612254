"""A learned selection over ranks: each chooses for its own rows, by a few numbers of every rank's blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raybsa.comm import Communicator
from raybsa.ring.partition import Partition
from raybsa.ring.runtime import gather_layout
from raybsa.selectors.pooling import blocks_before
from raybsa.selectors.shape import Shape
from raybsa.variants.selection import Selection
from raybsa.variants.selector import BlockSelector


def select_shard(
    selector: BlockSelector, q: Tensor, k: Tensor, partition: Partition, communicator: Communicator
) -> Selection:
    """The whole layout, the same on every rank, and the bias and choice of this rank's blocks.

    What travels is O(num_blocks): the blocks' statistics and the chosen blocks.

    Args:
        q, k: (B, H, S, D) and (B, Hkv, S, D) this rank's tokens.
    """
    size, length = selector.rules.block_size, partition.seq_len
    rows = partition.blocks(communicator.rank, size)
    own, keys = selector.query_stats(q), selector.key_stats(k)
    keys = gather_blocks(keys, partition, communicator, size)
    before = None
    if selector.rules.causal:
        before = blocks_before(gather_blocks(own, partition, communicator, size))[:, :, rows]
    shape = Shape.make(selector.rules, length, length, selector.density.value, q.device, rows)
    found = selector.choose(own, before, keys, shape)
    return found._replace(layout=gather_layout(found.layout, partition, communicator))


def gather_blocks(own: Tensor, partition: Partition, communicator: Communicator, block_size: int) -> Tensor:
    """(B, H, num_blocks, ...) in global order, from every rank's (B, H, own blocks, ...). Differentiable: a rank's
    gradient is the sum of what all ranks have for its blocks."""
    whole = _Gather.apply(own, partition, communicator, block_size)
    assert isinstance(whole, Tensor)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, partition: Partition, communicator: Communicator, block_size: int) -> Tensor:
        ids = [partition.blocks(rank, block_size) for rank in range(communicator.world_size)]
        ctx.mine, ctx.communicator = ids[communicator.rank], communicator
        padded = own.new_zeros(*own.shape[:2], max(map(len, ids)), *own.shape[3:])
        padded[:, :, : own.shape[2]] = own
        parts = communicator.all_gather("block_stats", padded)
        joined = torch.cat([part[:, :, : len(blocks)] for part, blocks in zip(parts, ids, strict=True)], 2)
        return torch.empty_like(joined).index_copy_(2, torch.cat(ids).to(own.device), joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        summed = ctx.communicator.all_reduce("block_stats_gradient", grad.contiguous().clone())
        return summed[:, :, ctx.mine.to(grad.device)], None, None, None
