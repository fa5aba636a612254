"""Plans say exactly what is needed, and the wire carries exactly that."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch

from raybsa import BlockLayout, patterns
from raybsa.comm import Communicator
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import Partition, partition_for
from raybsa.ring.plan import PLANS_KEPT, RingPlan, plan_for
from tests.ranks import run_ranks
from tests.threads import in_threads

HEAD_DIM, BATCH = 8, 2


def needed_bytes(layout: BlockLayout, partition: Partition, kv_heads: int, queries_per_kv: int) -> int:
    """K and V (float32) that ranks need and do not own, from the dense picture alone."""
    owner_q, owner_kv = (partition.owner_of(size) for size in (layout.q_block_size, layout.kv_block_size))
    dense = layout.to_dense()
    samples = BATCH if layout.num_groups == BATCH * kv_heads * queries_per_kv else 1
    heads = layout.num_groups // samples
    tokens = 0
    for rank in range(partition.world_size):
        mine = dense[:, owner_q == rank].any(1)  # (G, nKV)
        by_kv = mine.view(samples, max(1, heads // queries_per_kv), -1, mine.shape[-1]).any(2)
        away = by_kv & (owner_kv != rank)
        per_block = torch.full((mine.shape[-1],), layout.kv_block_size)
        per_block[-1] = layout.kv_len - (mine.shape[-1] - 1) * layout.kv_block_size
        copies = (BATCH // samples) * (kv_heads if layout.num_groups == 1 else 1)
        tokens += int((away.sum((0, 1)) * per_block).sum()) * copies
    return tokens * 2 * HEAD_DIM * 4


def bytes_on_the_wire(plan: RingPlan, world_size: int, heads: int, kv_heads: int) -> dict[str, int]:
    def work(communicator: Communicator) -> dict[str, int]:
        tokens = plan.partition.lengths[communicator.rank]
        q, k, v = (torch.randn(BATCH, n, tokens, HEAD_DIM, requires_grad=True) for n in (heads, kv_heads, kv_heads))
        out = ring_attention(q, k, v, plan, communicator)
        forward = communicator.ledger.sent["kv"]
        out.sum().backward()
        sent = communicator.ledger.sent
        return {"forward": forward, "again": sent["kv"] - forward, "returned": sent["kv_gradient"]}

    ranks = run_ranks(world_size, work)
    return {name: sum(rank[name] for rank in ranks) for name in ranks[0]}


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize(
    ("groups", "heads", "kv_heads"), [(1, 4, 4), (1, 4, 2), (4, 4, 2), (8, 4, 2)], ids=["one", "gqa", "head", "sample"]
)
def test_what_is_sent_is_what_is_needed(groups: int, heads: int, kv_heads: int, world_size: int) -> None:
    tokens = 16 * 63 + 9
    layout = BlockLayout.from_dense(
        torch.rand(groups, 64, 64) < 0.05, q_len=tokens, kv_len=tokens, q_block_size=16, causal=True
    )
    partition = partition_for([layout], world_size)
    plan = RingPlan(layout, partition, queries_per_kv=heads // kv_heads)
    needed = needed_bytes(layout, partition, kv_heads, heads // kv_heads)
    size = (kv_heads, HEAD_DIM, 4, BATCH)
    assert plan.bytes_needed(*size) == needed
    sent = bytes_on_the_wire(plan, world_size, heads, kv_heads)
    assert plan.bytes_sent(*size) == sent["forward"]
    assert sent["forward"] <= 1.02 * needed, sent
    assert sent["again"] == sent["returned"] == sent["forward"]


def test_a_block_diagonal_layout_sends_nothing() -> None:
    layout = BlockLayout.from_dense(
        torch.block_diag(*[torch.ones(8, 8)] * 4).bool(), q_len=512, kv_len=512, q_block_size=16
    )
    plan = RingPlan(layout, partition_for([layout], 4, strategy="contiguous"))
    assert plan.shifts == ()
    assert set(bytes_on_the_wire(plan, 4, 2, 2).values()) == {0}


def test_a_window_only_touches_neighbours() -> None:
    layout = patterns.build("sliding_window").layout(16 * 64, q_block_size=16, density=0.1)
    plan = RingPlan(layout, partition_for([layout], 4, strategy="contiguous"))
    pairs = {tuple(pair) for pair in plan.traffic.nonzero().tolist()}
    assert pairs == {(i, j) for i in range(4) for j in range(4) if abs(i - j) <= 1}
    assert plan.shifts == (1, 3)
    causal = patterns.build("sliding_window").layout(16 * 64, q_block_size=16, density=0.1, causal=True)
    assert RingPlan(causal, partition_for([causal], 4, strategy="contiguous")).shifts == (1,)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_dense_causal_sends_less_than_a_full_ring(world_size: int) -> None:
    layout = patterns.build("dense").layout(16 * 64, q_block_size=16, causal=True)
    share = {}
    for strategy in ("contiguous", "zigzag"):
        plan = RingPlan(layout, partition_for([layout], world_size, strategy=strategy))
        share[strategy] = plan.bytes_sent(2, HEAD_DIM, 4) / plan.bytes_full_ring(2, HEAD_DIM, 4)
    assert share["contiguous"] == pytest.approx(0.5, abs=0.01)
    assert share["zigzag"] == 0.75


def test_every_rank_lists_the_same_hops_and_pairs_match() -> None:
    layout = BlockLayout.from_dense(torch.rand(4, 40, 40) < 0.04, q_len=640, kv_len=640, q_block_size=16)
    plan = RingPlan(layout, partition_for([layout], 5))
    ranks = [plan.of_rank(rank) for rank in range(5)]
    assert {tuple(hop.shift for hop in rank.hops) for rank in ranks} == {(0, *plan.shifts)}
    for rank in ranks:
        for i, hop in enumerate(rank.hops):
            peer = ranks[hop.target].hops[i]
            assert peer.source == rank.rank
            assert len(peer.receive) == len(hop.send) == (int(plan.traffic[hop.target, rank.rank]) if i else 0)
    assert sum(hop.layout.nnz_blocks for rank in ranks for hop in rank.hops) == layout.nnz_blocks


def test_the_plan_reports_its_costs() -> None:
    layout = patterns.build("dense").layout(16 * 16, q_block_size=16, causal=True)
    plan = RingPlan(layout, partition_for([layout], 4, strategy="contiguous"))
    assert plan.active_blocks.tolist() == [10, 26, 42, 58]
    assert plan.imbalance == pytest.approx(58 / 34)
    assert plan.largest_buffer(2, 8, 4) == 4 * plan.block_bytes(2, 8, 4) == 4 * 2 * 2 * 16 * 8 * 4
    assert "max / mean 1.706" in plan.describe()


def test_a_plan_is_kept_with_its_layout() -> None:
    layout = patterns.build("dense").layout(256, q_block_size=16)
    partition = partition_for([layout], 2)
    assert plan_for(layout, partition) is plan_for(layout, partition)
    assert plan_for(layout, partition) is not plan_for(layout, partition, queries_per_kv=2)


def test_bad_plans_are_named() -> None:
    layout = BlockLayout.from_dense(torch.ones(4, 16, 16, dtype=torch.bool), q_len=256, kv_len=256, q_block_size=16)
    partition = partition_for([layout], 2)
    other = patterns.build("dense").layout(272, q_block_size=16)
    with pytest.raises(ValueError, match="must be of the partition's 256 tokens"):
        RingPlan(other, partition)
    with pytest.raises(ValueError, match="queries_per_kv must be positive and divide"):
        RingPlan(layout, partition, queries_per_kv=3)
    with pytest.raises(ValueError, match="got a selection"):
        RingPlan(layout.select(torch.tensor([0]), None), partition)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1"):
        RingPlan(layout, partition).of_rank(2)


def test_plans_go_with_their_layout_and_only_the_newest_partitions_stay() -> None:
    layout = patterns.build("sliding_window").layout(256, q_block_size=16, density=0.3)
    partitions = [partition_for([layout], 2, strategy="contiguous") for _ in range(PLANS_KEPT + 3)]
    plans = [weakref.ref(plan_for(layout, partition)) for partition in partitions]
    gc.collect()
    assert [plan() is not None for plan in plans] == [False] * 3 + [True] * PLANS_KEPT
    assert "_ring_plans" not in pickle.loads(pickle.dumps(layout)).__dict__, "another process plans for itself"
    alive = weakref.ref(layout)
    del layout
    gc.collect()
    assert alive() is None, "nothing may keep a layout that nobody uses"


def test_threads_that_plan_one_layout_get_each_the_plan_of_its_own_partition() -> None:
    layout = patterns.build("dense").layout(128, q_block_size=16)
    partitions = [partition_for([layout], 1 + number % 4, strategy="striped") for number in range(8)]
    plans = in_threads(lambda number: [plan_for(layout, partitions[number]) for _ in range(50)], threads=8)
    assert all(plan.partition is mine for mine, found in zip(partitions, plans, strict=True) for plan in found)
