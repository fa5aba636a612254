"""Who needs which KV blocks: the one fact that traffic follows from."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.layout import BlockLayout


def needed_blocks(layout: BlockLayout, q_owner: Tensor, world_size: int, kv_groups: int) -> Tensor:
    """(world_size, kv_groups, num_kv_blocks) bool: the rank has a query that sees the block. O(nnz) work.

    Args:
        layout: of the whole sequence.
        q_owner: (num_q_blocks,) int64, the rank of each query block.
        world_size: ranks.
        kv_groups: KV heads (times samples) that are told apart, a divisor of the layout's groups; 1 joins all heads.
    """
    groups, cols = layout.num_groups, layout.num_kv_blocks
    kv_group = torch.arange(groups) * kv_groups // groups
    row_base = (q_owner * kv_groups + kv_group[:, None]) * cols
    places = torch.repeat_interleave(row_base.int().view(-1), layout.row_counts.cpu().view(-1))
    needed = torch.zeros(world_size * kv_groups * cols, dtype=torch.bool)
    needed.numpy()[places.add_(layout.col_indices.cpu()).numpy()] = True
    return needed.view(world_size, kv_groups, cols)


def traffic(needed: Tensor, kv_owner: Tensor) -> Tensor:
    """(world_size, world_size) int64: blocks that the row's rank needs of the column's, one for each KV group that
    needs it; the diagonal is what stays at home."""
    world_size = needed.shape[0]
    return torch.zeros(world_size, world_size, dtype=torch.int64).index_add_(1, kv_owner, needed.sum(1))


def away(traffic: Tensor) -> int:
    """Blocks that travel: all but the diagonal."""
    return int(traffic.sum() - traffic.diagonal().sum())
