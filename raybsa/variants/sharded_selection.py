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
from raybsa.selectors.segment_blocks import BlockSegments
from raybsa.selectors.shape import Shape
from raybsa.selectors.visibility import Visibility
from raybsa.variants.selection import Selection
from raybsa.variants.selector import BlockSelector


def select_shard(
    selector: BlockSelector,
    q: Tensor,
    k: Tensor,
    partition: Partition,
    communicator: Communicator,
    segment_ids: Tensor | None = None,
) -> Selection:
    """The whole layout, the same on every rank, and the bias and choice of this rank's blocks.

    What travels is O(num_blocks): the blocks' statistics and the chosen blocks.

    Args:
        q, k: (B, H, S, D) and (B, Hkv, S, D) this rank's tokens.
        segment_ids: (B, S) int, this rank's tokens'.

    Raises:
        ValueError: segment_ids that do not fit, or that some ranks have and some have not; every rank raises.
    """
    size, length = selector.rules.block_size, partition.seq_len
    rows = partition.blocks(communicator.rank, size)
    visible = _visible(selector, q, segment_ids, rows, partition, communicator)
    taken = None if visible is None else visible.keys
    own, keys = selector.query_stats(q, taken), selector.key_stats(k, taken)
    keys = gather_blocks(keys, partition, communicator, size)
    before = None
    if selector.rules.causal:
        before = blocks_before(gather_blocks(own, partition, communicator, size))[:, :, rows]
    shape = Shape.make(selector.rules, length, length, selector.density.value, q.device, rows)
    found = selector.choose(own, before, keys, shape, visible)
    return found._replace(layout=gather_layout(found.layout, partition, communicator))


def _visible(
    selector: BlockSelector,
    q: Tensor,
    segment_ids: Tensor | None,
    rows: Tensor,
    partition: Partition,
    communicator: Communicator,
) -> Visibility | None:
    """What this rank's rows may look at. Three numbers a block travel: its segment, the least and the largest."""
    problem = None
    if segment_ids is not None and (segment_ids.shape != q.shape[::2] or segment_ids.is_floating_point()):
        problem = (
            f"segment_ids of rank {communicator.rank} must be int {tuple(q.shape[::2])}, one a token, got "
            f"{segment_ids.dtype} {tuple(segment_ids.shape)}"
        )
    communicator.agree("segments of a selection", problem or f"segments {segment_ids is not None}")
    if problem is not None:
        raise ValueError(problem)
    if segment_ids is None:
        return None
    size, ids = selector.rules.block_size, segment_ids.long()
    every = torch.ones_like(ids, dtype=torch.bool)
    here = BlockSegments.of(ids, every, every, size, last=selector.rules.causal)
    numbers = torch.stack([here.segment, here.low, here.high], 2)[:, None]
    segment, low, high = gather_blocks(numbers, partition, communicator, size)[:, 0].unbind(2)
    whole = BlockSegments(segment, torch.ones_like(segment, dtype=torch.bool), low, high)
    return Visibility.of_shard(selector.content, size, ids, here, whole, rows.to(ids.device))


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
