"""A model whose sequence is split across ranks computes what it computes on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raybsa import patterns
from raybsa.comm import Communicator
from raybsa.ring.partition import STRATEGIES, partition_for
from raybsa.ring.sequence import ShardedSequence
from raybsa.ring.shared_partitions import forget_partitions
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.model import Transformer
from raybsa.tasks.training import cross_entropy
from raybsa.variants.distributed import DistributedConfig, share_partition
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_previous_tokens_cross_the_borders_and_so_do_their_gradients(strategy: str) -> None:
    layout = patterns.build("dense").layout(16 * 7 + 3, q_block_size=16)
    partition = partition_for([layout], 3, strategy=strategy)
    x, upstream = torch.randn(2, 1, 2, layout.q_len, 4)
    before = torch.arange(layout.q_len).sub(1).clamp(min=0)
    whole = x.clone().requires_grad_()
    (whole[:, :, before] * upstream).sum().backward()

    def work(communicator: Communicator) -> tuple[Tensor, Tensor, int]:
        sequence = ShardedSequence(partition, communicator)
        mine = sequence.shard(x, 2).clone().requires_grad_()
        out = sequence.previous(mine)
        (out * sequence.shard(upstream, 2)).sum().backward()
        return out.detach(), mine.grad, communicator.ledger.sent["halo"]

    outs, grads, sent = zip(*run_ranks(3, work), strict=True)
    assert torch.equal(partition.join(outs), x[:, :, before])
    assert torch.allclose(partition.join(grads), whole.grad)
    owner = partition.owner
    borders = int((owner[1:] != owner[:-1]).sum())
    assert sum(sent) == 2 * borders * x[:, :, 0].nbytes


def spec(variant: str) -> TrialSpec:
    window = AttentionSpec(variant, PatternSpec("sliding_window"), 0.3, 16)
    random = AttentionSpec(variant, PatternSpec("random"), 0.3, 16)
    return TrialSpec("byte_lm", (window, random), train_len=16 * 9, num_heads=4, num_kv_heads=2, dtype="float64")


@pytest.mark.parametrize("strategy", ["balanced", "striped"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_transformer_on_shards_equals_one_on_the_whole(world_size: int, strategy: str) -> None:
    tokens, targets = torch.randint(0, 256, (2, 2, 144))
    alone = Transformer(spec("base"), 256).double()
    cross_entropy(alone(tokens), targets).backward()

    def work(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        model = Transformer(spec("distributed"), 256).double()
        config = DistributedConfig(partition=strategy)
        partition = share_partition(model, communicator, 144, num_heads=4, config=config)
        sequence = ShardedSequence(partition, communicator)
        logits = model(sequence.shard(tokens), sequence)
        loss = cross_entropy(logits, sequence.shard(targets), reduction="sum") / targets.numel()
        loss.backward()
        return partition.join(communicator_gather(communicator, logits, partition), 1), [
            communicator.all_reduce("gradient", p.grad) for p in model.parameters()
        ]

    for logits, grads in run_ranks(world_size, work):
        assert relative_error(logits, alone(tokens).detach()) <= 1e-10
        for got, parameter in zip(grads, alone.parameters(), strict=True):
            assert relative_error(got, parameter.grad) <= 1e-9


def communicator_gather(communicator: Communicator, x: Tensor, partition) -> list[Tensor]:
    padded = x.new_zeros(x.shape[0], max(partition.lengths), x.shape[2])
    padded[:, : x.shape[1]] = x.detach()
    parts = communicator.all_gather("test", padded)
    return [part[:, :n] for part, n in zip(parts, partition.lengths, strict=True)]


def test_a_sequence_that_is_dealt_otherwise_than_the_group_s_is_refused_on_every_rank() -> None:
    layout = patterns.build("dense").layout(64, q_block_size=16)
    x = torch.randn(1, 1, 32, 4)

    def work(communicator: Communicator) -> list[str]:
        first, other = (partition_for([layout], 2, strategy=strategy) for strategy in ("striped", "contiguous"))
        sequence = ShardedSequence(first, communicator)
        assert ShardedSequence(replace(first), communicator).positions.tolist() == sequence.positions.tolist()
        said = []
        with pytest.raises(ValueError, match="share_partition") as refused:
            ShardedSequence(other, communicator)
        said.append(str(refused.value))
        forget_partitions(communicator)
        ShardedSequence(other, communicator)
        for use in (lambda: sequence.previous(x), lambda: sequence.shard(torch.zeros(1, 64))):
            with pytest.raises(ValueError, match="share_partition") as refused:
                use()
            said.append(str(refused.value))
        return said

    first, second = run_ranks(2, work)
    assert first == second
    assert "64 tokens are dealt to these ranks as given blocks of 16 tokens" in first[0]


def test_a_sequence_and_a_group_of_different_sizes_are_refused() -> None:
    layout = patterns.build("dense").layout(64, q_block_size=16)
    with pytest.raises(ValueError, match="the partition is for 2 ranks, the communicator has 1"):
        ShardedSequence(partition_for([layout], 2), Communicator())
    with pytest.raises(ValueError, match="must hold a BlockSparseDistributed"):
        share_partition(Transformer(replace(spec("base")), 256), Communicator(), 144)
