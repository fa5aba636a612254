"""BlockSparseDistributed gives every rank the rows that BlockSparseBase gives one device, and behaves as a module."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raybsa import (
    BlockLayout,
    BlockSparseBase,
    BlockSparseDistributed,
    DistributedConfig,
    block_sparse_attention,
    create_block_sparse_attention,
)
from raybsa.comm import Communicator
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import plan_for
from raybsa.ring.runtime import gather_layout
from raybsa.variants.distributed import share_partition
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks

PATTERN = {"pattern": "bigbird", "density": 0.3, "block_size": 16, "causal": True}


def whole(seed: int = 0, tokens: int = 250) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("partition", ["balanced", "striped"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gets_the_rows_of_one_device(world_size: int, partition: str) -> None:
    wanted = BlockSparseBase(**PATTERN)(*whole())

    def work(communicator: Communicator) -> Tensor:
        model = create_block_sparse_attention(
            "distributed", distributed_config=DistributedConfig(partition=partition), **PATTERN
        )
        assert model.bind(communicator) is model
        return model.gather(model(*(model.shard(x) for x in whole())))

    for got in run_ranks(world_size, work):
        assert relative_error(got, wanted) <= 1e-10


def test_gradients_reach_the_whole_through_shard() -> None:
    leaves = [x.requires_grad_() for x in whole()]
    BlockSparseBase(**PATTERN)(*leaves).square().sum().backward()

    def work(communicator: Communicator) -> list[Tensor]:
        model = BlockSparseDistributed(**PATTERN).bind(communicator)
        mine = [x.requires_grad_() for x in whole()]
        model(*(model.shard(x) for x in mine)).square().sum().backward()
        return [communicator.all_reduce("test", x.grad) for x in mine]

    for grads in run_ranks(3, work):
        for got, leaf in zip(grads, leaves, strict=True):
            assert relative_error(got, leaf.grad) <= 1e-10


class TwoLayers(nn.Module):
    """Heads of 8, a causal layer and a two-sided one: one partition must serve both."""

    def __init__(self, make) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(causal) for causal in (True, False))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x)
        return x


def test_layers_of_one_model_share_a_partition() -> None:
    x = whole()[0]

    def options(causal: bool) -> dict:
        return PATTERN | {"causal": causal}

    wanted = TwoLayers(lambda causal: BlockSparseBase(**options(causal)))(x)

    def work(communicator: Communicator) -> tuple[Tensor, bool]:
        model = TwoLayers(lambda causal: BlockSparseDistributed(**options(causal)))
        partition = share_partition(model, communicator, x.shape[2], num_heads=4)
        out = model.layers[0].gather(model(partition.shard(x, communicator.rank)))
        return out, model.layers[0].partition is model.layers[1].partition

    for got, shared in run_ranks(3, work):
        assert shared
        assert relative_error(got, wanted) <= 1e-10


def test_dropout_agrees_between_ranks_and_is_off_in_eval() -> None:
    def work(communicator: Communicator) -> list[Tensor]:
        torch.manual_seed(communicator.rank)
        model = BlockSparseDistributed(dropout=0.5, **PATTERN).bind(communicator)
        shards = [model.shard(x) for x in whole()]
        return [model.gather(out) for out in (model(*shards), model.eval()(*shards))]

    (dropped, plain), (same_dropped, _) = run_ranks(2, work)
    assert torch.equal(dropped, same_dropped)
    assert relative_error(plain, BlockSparseBase(**PATTERN)(*whole())) <= 1e-10
    assert relative_error(dropped, plain) > 0.1


@pytest.mark.parametrize("codec", ["int8", {"name": "topk", "params": {"density": 0.1}}], ids=["int8", "topk"])
def test_what_a_codec_loses_of_a_gradient_comes_with_the_next(codec) -> None:
    """The same backward again and again: with error feedback the mean of what arrives goes to the exact gradient."""
    q, k, v = (x.float() for x in whole())
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    BlockSparseBase(**PATTERN)(*exact).square().sum().backward()
    steps = 40

    def work(communicator: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        model = BlockSparseDistributed(DistributedConfig(gradient_codec=codec), **PATTERN).bind(communicator)
        total, first = [torch.zeros(()), torch.zeros(())], None
        for _ in range(steps):
            shards = [model.shard(x).requires_grad_() for x in (q, k, v)]
            model(*shards).square().sum().backward()
            found = [shard.grad for shard in shards[1:]]
            first = first or found
            total = [a + b for a, b in zip(total, found, strict=True)]
        return [model.gather(x) for x in first], [model.gather(x / steps) for x in total]

    for first, mean in run_ranks(2, work):
        for once, many, leaf in zip(first, mean, exact[1:], strict=True):
            assert relative_error(many, leaf.grad) < 0.3 * relative_error(once, leaf.grad)
            assert relative_error(once, leaf.grad) > 1e-4, "a lossy codec loses something"


def test_a_bound_module_copies_and_pickles_unbound() -> None:
    def work(communicator: Communicator) -> list[BlockSparseDistributed]:
        model = BlockSparseDistributed(**PATTERN).bind(communicator)
        model.prepare(64)
        return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]

    for model in run_ranks(2, work)[0]:
        assert model.communicator.world_size == 1
        q, k, v = whole()
        assert relative_error(model(q, k, v), BlockSparseBase(**PATTERN)(q, k, v)) <= 1e-10


def test_a_rank_that_cannot_know_the_whole_says_what_to_call() -> None:
    def work(communicator: Communicator) -> None:
        model = BlockSparseDistributed(**PATTERN).bind(communicator)
        with pytest.raises(ValueError, match=r"call shard\(x\), prepare\(seq_len\) or bind"):
            model(*whole())

    run_ranks(2, work)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="partition must be one of"):
        DistributedConfig(partition="ring")
    with pytest.raises(ValueError, match="unknown codec 'zip'"):
        DistributedConfig(gradient_codec="zip")
    with pytest.raises(ValueError, match="needs sums over all ranks"):
        DistributedConfig(gradient_codec="powersgd")
    with pytest.raises(TypeError, match="config must be a DistributedConfig, got dict"):
        BlockSparseDistributed({"partition": "zigzag"})
    with pytest.raises(ValueError, match="must hold a BlockSparseDistributed"):
        share_partition(nn.Linear(2, 2), Communicator(), 64)
    with pytest.raises(ValueError, match="the partition is for 1 ranks"):
        run_ranks(2, lambda c: BlockSparseDistributed(**PATTERN).bind(c, BlockSparseDistributed(**PATTERN).prepare(64)))


def test_layouts_chosen_at_run_time_go_through_the_same_ring() -> None:
    """Every rank picks blocks for its own rows, per sample and head, with a bias: as a learned selector will."""
    q, k, v = whole(tokens=16 * 13)
    base = BlockSparseBase(pattern="dense", block_size=16, causal=True)
    partition = partition_for([base.source.select(q, k)[0]], 3)
    picture = torch.rand(8, 13, 13) < 0.4
    size = {"q_len": 208, "kv_len": 208, "q_block_size": 16, "causal": True}
    layout = BlockLayout.from_dense(picture, **size)
    bias = torch.randn(layout.nnz_blocks, dtype=torch.float64)
    wanted = block_sparse_attention(q, k, v, layout, block_bias=bias)

    def work(communicator: Communicator) -> Tensor:
        own, index = layout.select(partition.blocks(communicator.rank), None, return_index=True)
        gathered = gather_layout(own, partition, communicator)
        assert gathered.digest() == layout.digest()
        plan = plan_for(gathered, partition, queries_per_kv=2)
        shards = [partition.shard(x, communicator.rank) for x in (q, k, v)]
        return ring_attention(*shards, plan, communicator, block_bias=bias[index])

    assert relative_error(partition.join(run_ranks(3, work)), wanted) <= 1e-10


def test_rows_of_other_blocks_than_ones_own_are_refused_on_every_rank() -> None:
    layout = BlockLayout.from_dense(torch.ones(8, 8, dtype=torch.bool), q_len=128, kv_len=128, q_block_size=16)
    partition = partition_for([layout], 2)

    def work(communicator: Communicator) -> str:
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            gather_layout(layout.select(partition.blocks(0), None), partition, communicator)
        return str(raised.value)

    assert all("rank 1 must give the rows of its 4 query blocks" in message for message in run_ranks(2, work))


def test_torchrun_alone_compares_a_ring_of_processes_with_one_device() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "raybsa.ring.check"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "every case equals one device" in done.stdout
    assert "OFF" not in done.stdout


@pytest.mark.parametrize("width", [4, 12])
def test_values_of_another_width_go_round_too(width: int) -> None:
    q, k, _ = whole()
    v = torch.randn(2, 2, 250, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = BlockSparseBase(**PATTERN)(q, k, v)

    def work(communicator: Communicator) -> Tensor:
        model = create_block_sparse_attention("distributed", **PATTERN).bind(communicator)
        return model.gather(model(*(model.shard(x) for x in (q, k, v))))

    for got in run_ranks(2, work):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) <= 1e-10


def test_segments_that_are_written_to_before_the_backward_are_told() -> None:
    model, (q, k, v) = create_block_sparse_attention("distributed", **PATTERN), whole()
    ids = torch.zeros(2, 250, dtype=torch.int64)
    out = model(q.requires_grad_(), k, v, segment_ids=ids)
    ids[:, 100:] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_ring_refuses_what_it_cannot_send() -> None:
    model, (q, k, v) = create_block_sparse_attention("distributed", **PATTERN), whole()
    with pytest.raises(NotImplementedError, match=r"a ring needs tensors .* within torch\.func"):
        torch.vmap(model)(q[None], k[None], v[None])
    with pytest.raises(NotImplementedError, match="got a tensor on the meta device"):
        model(*(x.to("meta") for x in (q, k, v)))
