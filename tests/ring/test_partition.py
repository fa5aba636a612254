"""Partitions deal every block once, evenly, and as their strategy says."""

from __future__ import annotations

import pytest
import torch

from raybsa import BlockLayout, patterns
from raybsa.ring.partition import STRATEGIES, Partition, imbalance, partition_for


def dense(tokens: int, block: int = 16, causal: bool = True) -> BlockLayout:
    return patterns.build("dense").layout(tokens, q_block_size=block, causal=causal)


def active(layout: BlockLayout, partition: Partition) -> torch.Tensor:
    owner = partition.owner_of(layout.q_block_size)
    return torch.bincount(owner, weights=layout.row_counts.sum(0).double(), minlength=partition.world_size)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tokens", [16 * 8, 16 * 13 + 3, 16 * 40])
def test_every_block_is_dealt_once_and_evenly(strategy: str, world_size: int, tokens: int) -> None:
    partition = partition_for([dense(tokens)], world_size, strategy=strategy)
    held = torch.cat([partition.blocks(rank) for rank in range(world_size)])
    assert torch.equal(held.sort().values, torch.arange(-(-tokens // 16)))
    assert int(partition.counts.max() - partition.counts.min()) <= 1
    assert torch.equal(partition.permutation[partition.inverse], torch.arange(tokens))
    assert sum(partition.lengths) == tokens


def test_the_strategies_deal_as_their_names_say() -> None:
    deal = {name: partition_for([dense(16 * 8)], 2, strategy=name).owner.tolist() for name in STRATEGIES}
    assert deal["contiguous"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert deal["zigzag"] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert deal["striped"] == [0, 1, 0, 1, 0, 1, 0, 1]


def test_shards_join_to_the_whole() -> None:
    partition = partition_for([dense(16 * 13 + 3)], 3)
    x = torch.randn(2, partition.seq_len, 4)
    shards = [partition.shard(x, rank, 1) for rank in range(3)]
    assert torch.equal(partition.join(shards, 1), x)
    with pytest.raises(ValueError, match="dimension 2 must hold 211 tokens"):
        partition.shard(x, 0)
    with pytest.raises(ValueError, match="shards must hold"):
        partition.join(shards[::-1], 1)


def test_finer_blocks_follow_their_coarse_one() -> None:
    layout = BlockLayout.from_dense(
        torch.ones(14, 7, dtype=torch.bool), q_len=107, kv_len=107, q_block_size=8, kv_block_size=16
    )
    partition = partition_for([layout], 3)
    assert partition.block_size == 16
    assert torch.equal(partition.owner_of(8), partition.owner.repeat_interleave(2)[:14])
    with pytest.raises(ValueError, match=r"those that divide the partition's 16 tokens do, got blocks of 12"):
        partition.owner_of(12)


def test_coarser_blocks_that_lie_on_one_rank_each_are_that_rank_s() -> None:
    layout = BlockLayout.from_dense(torch.ones(7, 7, dtype=torch.bool), q_len=107, kv_len=107, q_block_size=16)
    halves = Partition(107, 16, torch.tensor([0, 0, 1, 1, 0, 0, 1]), 2)
    assert halves.owner_of(32).tolist() == [0, 1, 0, 1]
    assert halves.blocks(1, 32).tolist() == [1, 3]
    for size in (64, 128):
        with pytest.raises(ValueError, match=f"one rank each were wanted, .*, got blocks of {size}"):
            halves.owner_of(size)
    with pytest.raises(ValueError, match="got blocks of 32"):
        partition_for([layout], 2, strategy="striped").owner_of(32)
    assert Partition(107, 16, torch.zeros(7, dtype=torch.int64), 1).owner_of(128).tolist() == [0]


def skewed(num_blocks: int, heads: int = 4) -> BlockLayout:
    """Each head's rows are long in another region, up to four times as long as elsewhere."""
    row, col = torch.arange(num_blocks)[:, None], torch.arange(num_blocks)[None, :]
    mask = torch.stack(
        [(row - col).abs() < torch.where(row < (h + 1) * num_blocks // (2 * heads), 40, 10) for h in range(heads)]
    )
    return BlockLayout.from_dense(mask, q_len=num_blocks * 16, kv_len=num_blocks * 16, q_block_size=16)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_balancing_evens_out_skewed_heads(world_size: int) -> None:
    layout = skewed(64 * world_size)
    before = imbalance(active(layout, partition_for([layout], world_size, strategy="contiguous")))
    balanced = partition_for([layout], world_size)
    assert before > 1.3
    assert imbalance(active(layout, balanced)) <= 1.05
    assert int(balanced.counts.max() - balanced.counts.min()) <= 1


def test_uneven_counts_are_allowed_where_asked() -> None:
    layout = skewed(96)
    partition = partition_for([layout], 3, equal_counts=False)
    assert int(partition.counts.max() - partition.counts.min()) > 1
    assert imbalance(active(layout, partition)) <= 1.05


def test_one_partition_balances_all_layers_together() -> None:
    up, down = dense(16 * 64), dense(16 * 64)
    flipped = BlockLayout.from_dense(down.to_dense()[0].flip(0, 1), q_len=1024, kv_len=1024, q_block_size=16)
    partition = partition_for([up, flipped], 4)
    assert imbalance(active(up, partition) + active(flipped, partition)) <= 1.01
    assert torch.equal(partition.owner, partition_for([up, flipped], 4, strategy="contiguous").owner)


def test_a_balanced_window_keeps_neighbours_together() -> None:
    layout = patterns.build("sliding_window").layout(16 * 256, q_block_size=16, density=0.05)
    owner = partition_for([layout], 4).owner
    assert int((owner.diff() != 0).sum()) <= 20, "a window is even already, but for its ends"


def test_a_dense_causal_layout_is_dealt_in_zigzag() -> None:
    layout = dense(16 * 64)
    assert torch.equal(partition_for([layout], 4).owner, partition_for([layout], 4, strategy="zigzag").owner)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 9}, "world_size must lie in 1..8"),
        ({"world_size": 0}, "world_size must lie in 1..8"),
        ({"world_size": 2, "strategy": "random"}, "strategy must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_for([dense(128)], **arguments)


def test_layouts_that_are_not_one_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="must all be of one sequence"):
        partition_for([dense(128), dense(160)], 2)
    with pytest.raises(ValueError, match="at least one"):
        partition_for([], 2)
    with pytest.raises(ValueError, match="whole layouts"):
        partition_for([dense(128).select(torch.tensor([0, 1]), None)], 2)
    with pytest.raises(ValueError, match="must own a block"):
        Partition(64, 16, torch.tensor([0, 0, 0, 0]), 2)
