"""Layers on one group of ranks go by one partition of a length: they equal one device, or all ranks refuse in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybsa import BlockSparseBase, BlockSparseDistributed, DistributedConfig, patterns
from raybsa.comm import Communicator
from raybsa.ring.partition import Partition, partition_for
from raybsa.ring.sequence import ShardedSequence
from raybsa.ring.shared_partitions import forget_partitions
from raybsa.variants.distributed import share_partition
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks

TOKENS, H, D = 208, 2, 8
# By themselves they would deal 208 tokens in two ways: one layer has its work where the other has none.
PATTERNS: list[dict[str, Any]] = [
    {"pattern": "dense", "block_size": 16, "causal": True},
    {"pattern": "sliding_window", "density": 0.3, "block_size": 16},
]


class Model(nn.Module):
    """Layers with projections between them; x is (B, S, H * D) of all tokens or a rank's."""

    def __init__(self, attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attentions)
        self.projections = nn.ModuleList(nn.Linear(H * D, 3 * H * D) for _ in attentions)
        self.double()
        generator = torch.Generator().manual_seed(0)  # ranks are threads here, and torch's own is one for all
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for projection, attention in zip(self.projections, self.attentions, strict=True):
            q, k, v = (y.unflatten(-1, (H, D)).transpose(1, 2) for y in projection(x).chunk(3, -1))
            x = x + attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def layers(*configs: DistributedConfig | None, **changed: Any) -> list[BlockSparseDistributed]:
    configs = configs or (None, None)
    return [
        BlockSparseDistributed(config, **options | changed) for config, options in zip(configs, PATTERNS, strict=True)
    ]


def inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(2, tokens, H * D, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def one_device(options: Sequence[dict[str, Any]] = PATTERNS, tokens: int = TOKENS) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients with the whole sequence."""
    model = Model([BlockSparseBase(**one) for one in options])
    loss = model(inputs(tokens)).square().sum()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def over_ranks(model: Model, first: BlockSparseDistributed, tokens: int = TOKENS) -> tuple[Tensor, list[Tensor]]:
    """The same from this rank's tokens, which ``first`` cuts, summed over ranks."""
    communicator = first.communicator
    loss = model(first.shard(inputs(tokens), 1)).square().sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return communicator.all_reduce("loss", loss.detach()), [communicator.all_reduce("gradient", g) for g in grads]


def assert_equals_one_device(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> None:
    assert relative_error(found[0], wanted[0]) <= 1e-10
    for one, other in zip(found[1], wanted[1], strict=True):
        assert relative_error(one, other) <= 1e-10


def refusals(work: Callable[[Communicator], object], match: str, world_size: int = 2) -> str:
    """What ``work`` raises: a ValueError that names ``share_partition``, and the same one on every rank."""

    def refused(communicator: Communicator) -> str:
        with pytest.raises(ValueError, match=match) as raised:
            work(communicator)
        return str(raised.value)

    said = run_ranks(world_size, refused)
    assert len(set(said)) == 1
    assert "share_partition" in said[0]
    return said[0]


def partition_of(strategy: str, block_size: int = 16, tokens: int = TOKENS) -> Partition:
    return partition_for([patterns.build("dense").layout(tokens, q_block_size=block_size)], 2, strategy=strategy)


def test_these_patterns_alone_would_be_dealt_in_two_ways() -> None:
    dealt = [
        partition_for([layer.source.layout(TOKENS, TOKENS, H, torch.device("cpu"))], 2).digest() for layer in layers()
    ]
    assert dealt[0] != dealt[1], "else nothing here could fail"


# ---- the second layer takes the first one's ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["prepare", "shard", "nothing"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_layers_that_prepare_for_themselves_equal_one_device(world_size: int, how: str) -> None:
    wanted = one_device()

    def work(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        first, second = layers()
        first.bind(communicator).prepare(TOKENS)
        second.bind(communicator)
        if how == "prepare":
            assert second.prepare(TOKENS) is first.partition
        elif how == "shard":
            second.shard(inputs(), 1)
        return over_ranks(Model([first, second]), first)

    for found in run_ranks(world_size, work):
        assert_equals_one_device(found, wanted)


def test_layers_with_a_communicator_each_on_one_group_equal_one_device() -> None:
    wanted = one_device()

    def work(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        own = [communicator, Communicator(communicator.group, timeout_s=30.0)]
        first, second = (layer.bind(one) for layer, one in zip(layers(), own, strict=True))
        first.prepare(TOKENS)
        assert second.prepare(TOKENS) is first.partition
        found = over_ranks(Model([first, second]), first)
        own[1].close()
        return found

    for found in run_ranks(2, work):
        assert_equals_one_device(found, wanted)


def test_larger_blocks_go_by_a_partition_of_smaller_ones_where_each_lies_on_one_rank() -> None:
    options = [PATTERNS[0], PATTERNS[1] | {"block_size": 32}]
    wanted = one_device(options)

    def work(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        first, second = (BlockSparseDistributed(**one).bind(communicator) for one in options)
        first.bind(communicator, Partition(TOKENS, 16, torch.tensor([0, 0, 1, 1] * 3 + [0]), 2))
        return over_ranks(Model([first, second]), first)

    for found in run_ranks(2, work):
        assert_equals_one_device(found, wanted)


def test_smaller_blocks_go_by_a_partition_of_larger_ones() -> None:
    options = [PATTERNS[1] | {"block_size": 64}, PATTERNS[0]]
    wanted = one_device(options)

    def work(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        first, second = (BlockSparseDistributed(**one).bind(communicator) for one in options)
        assert first.prepare(TOKENS) is second.prepare(TOKENS)
        return over_ranks(Model([first, second]), first)

    for found in run_ranks(2, work):
        assert_equals_one_device(found, wanted)


def test_lengths_in_turn_have_a_partition_each() -> None:
    """Also for a layer that nobody tells: it goes by the length that was last asked for."""
    lengths = (TOKENS, 96, TOKENS, 130)
    wanted = [one_device(tokens=tokens) for tokens in lengths]

    def work(communicator: Communicator) -> list[tuple[Tensor, list[Tensor]]]:
        first, second = (layer.bind(communicator) for layer in layers())
        model = Model([first, second])
        return [over_ranks(model, first, tokens) for tokens in lengths]

    for found in run_ranks(2, work):
        for one, other in zip(found, wanted, strict=True):
            assert_equals_one_device(one, other)


def test_a_new_group_begins_anew() -> None:
    """After a rebuild the first layer that deals decides again, and a layer that is not bound again is not asked."""
    wanted, kept = one_device(), [layers() for _ in range(2)]

    def work(communicator: Communicator) -> tuple[str, tuple[Tensor, list[Tensor]]]:
        first, second = (layer.bind(communicator) for layer in kept[communicator.rank])
        if not turned:
            first, second = second, first
        digest = first.prepare(TOKENS).digest()
        second.prepare(TOKENS)
        return digest, over_ranks(Model(kept[communicator.rank]), first)

    turned: list[int] = []
    before = run_ranks(2, work)
    turned.append(1)
    after = run_ranks(2, work)
    assert before[0][0] == before[1][0] != after[0][0] == after[1][0]
    for _, found in (*before, *after):
        assert_equals_one_device(found, wanted)


def test_a_layer_without_a_config_takes_any_partition_and_one_with_a_config_the_same() -> None:
    def work(communicator: Communicator) -> bool:
        striped = DistributedConfig(partition="striped")
        made = [layer.bind(communicator) for layer in (*layers(striped, None), *layers(striped, striped))]
        return len({id(layer.prepare(TOKENS)) for layer in made}) == 1

    assert all(run_ranks(2, work))


# ---- or every rank refuses ---------------------------------------------------------------------------------------


def test_blocks_that_would_lie_on_several_ranks_are_refused() -> None:
    def work(communicator: Communicator) -> None:
        first = BlockSparseDistributed(DistributedConfig(partition="striped"), **PATTERNS[0]).bind(communicator)
        first.prepare(TOKENS)
        BlockSparseDistributed(**PATTERNS[1] | {"block_size": 64}).bind(communicator).prepare(TOKENS)

    said = refusals(work, "208 tokens are dealt to these ranks already; this layer has blocks of 64 tokens")
    assert "got blocks of 64" in said


def test_a_layer_that_is_not_prepared_refuses_when_it_is_called() -> None:
    def work(communicator: Communicator) -> None:
        first = BlockSparseDistributed(DistributedConfig(partition="striped"), **PATTERNS[0]).bind(communicator)
        second = BlockSparseDistributed(**PATTERNS[1] | {"block_size": 64}).bind(communicator)
        over_ranks(Model([first, second]), first)

    refusals(work, "this layer has blocks of 64 tokens")


def test_a_config_that_asks_for_another_partition_is_refused() -> None:
    def work(communicator: Communicator) -> None:
        first, second = layers(None, DistributedConfig(partition="zigzag"))
        first.bind(communicator).prepare(TOKENS)
        second.bind(communicator).shard(inputs(), 1)

    refusals(work, r"config asks for Dealing\(strategy='zigzag', .* dealt by Dealing\(strategy='balanced'")


def test_two_given_partitions_are_refused() -> None:
    def work(communicator: Communicator) -> None:
        first, second = layers()
        first.bind(communicator, partition_of("contiguous"))
        second.bind(communicator, partition_of("contiguous"))  # the same blocks
        assert second.partition is first.partition
        second.bind(communicator, partition_of("striped"))

    said = refusals(work, "208 tokens are dealt to these ranks as given blocks of 16 tokens")
    assert len(re.findall(r"given blocks of 16 tokens \(\w{8}\)", said)) == 2


def test_a_given_partition_after_a_dealt_one_and_for_other_blocks_is_refused() -> None:
    def work(communicator: Communicator) -> None:
        first, second = layers()
        first.bind(communicator).prepare(TOKENS)
        second.bind(communicator, partition_of("striped"))

    refusals(work, "dealt to these ranks as balanced blocks")
    with pytest.raises(ValueError, match="got blocks of 16"):
        run_ranks(2, lambda communicator: layers()[0].bind(communicator, partition_of("striped", 8)))


def test_a_partition_that_is_shared_too_late_is_refused_and_forgetting_lets_it_be() -> None:
    wanted = one_device()

    def late(communicator: Communicator) -> None:
        model = Model([layer.bind(communicator) for layer in layers()])
        model.attentions[1].shard(inputs(), 1)
        share_partition(model, communicator, TOKENS, H)

    refusals(late, "before the first shard")

    def in_time(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        model = Model([layer.bind(communicator) for layer in layers()])
        model.attentions[1].shard(inputs(), 1)
        forget_partitions(communicator)
        share_partition(model, communicator, TOKENS, H)
        return over_ranks(model, model.attentions[0])

    for found in run_ranks(2, in_time):
        assert_equals_one_device(found, wanted)


def test_a_model_whose_partition_was_forgotten_refuses_and_can_be_bound_again() -> None:
    wanted = one_device()

    def work(communicator: Communicator) -> tuple[Tensor, list[Tensor]]:
        first, other = Model(layers()), Model(layers(DistributedConfig(partition="striped"), None))
        shard = share_partition(first, communicator, TOKENS, H).shard(inputs(), communicator.rank, 1)
        forget_partitions(communicator)
        for now in ("not dealt any more", "now dealt as striped blocks"):
            with pytest.raises(ValueError, match=f"was forgotten: its 208 tokens are {now}.*share_partition"):
                first(shard)
            if now.startswith("not"):
                share_partition(other, communicator, TOKENS, H)
        assert_equals_one_device(over_ranks(other, other.attentions[0]), wanted)
        forget_partitions(communicator)
        share_partition(first, communicator, TOKENS, H)
        return over_ranks(first, first.attentions[0])

    for found in run_ranks(2, work):
        assert_equals_one_device(found, wanted)


def test_layers_whose_configs_differ_are_not_made_alike_without_a_word() -> None:
    lossy = DistributedConfig(gradient_codec="int8")

    def work(communicator: Communicator, config: DistributedConfig | None = None) -> list[DistributedConfig]:
        model = Model(layers(lossy, DistributedConfig()))
        share_partition(model, communicator, TOKENS, H, config)
        return [layer.config for layer in model.attentions]

    refusals(work, r"layers that share a partition ask for .*'int8'.* and .*'none'.*: give share_partition a config")
    assert run_ranks(2, lambda communicator: work(communicator, lossy)) == [[lossy, lossy]] * 2

    def one_asks(communicator: Communicator) -> list[DistributedConfig]:
        model = Model(layers(None, lossy))
        share_partition(model, communicator, TOKENS, H)
        return [layer.config for layer in model.attentions]

    assert run_ranks(2, one_asks) == [[lossy, lossy]] * 2


def test_positions_and_layers_go_by_one_partition() -> None:
    def work(communicator: Communicator) -> None:
        first, _ = layers()
        first.bind(communicator).prepare(TOKENS)
        assert (
            ShardedSequence(first.partition, communicator).positions.tolist()
            == first.partition.tokens(communicator.rank).tolist()
        )
        ShardedSequence(partition_of("striped"), communicator)

    refusals(work, "dealt to these ranks as balanced blocks")


def test_ranks_that_deal_in_two_ways_all_raise() -> None:
    """Programs that differ: what no rank knows of the others is told in the first call."""

    def work(communicator: Communicator) -> None:
        (first, _), x = layers(), inputs()
        first.bind(communicator, partition_of("striped" if communicator.rank else "contiguous"))
        q = first.shard(x, 1).unflatten(-1, (H, D)).transpose(1, 2)
        first(q, q, q)

    with pytest.raises(ValueError, match=r"ranks? (disagree|[01] holds)"):
        run_ranks(2, work)


@pytest.mark.parametrize("pattern", ["sliding_window", "adaptive"])
def test_a_shard_of_another_length_on_one_rank_is_refused_on_every_rank(pattern: str) -> None:
    def work(communicator: Communicator) -> str:
        layer = BlockSparseDistributed(pattern=pattern, density=0.3, block_size=16, num_heads=H, head_dim=D)
        layer.bind(communicator).prepare(TOKENS)
        lengths = [*layer.partition.lengths]
        lengths[1] -= 16
        q = torch.randn(1, H, lengths[communicator.rank], D)
        with pytest.raises(ValueError, match="rank 1 holds") as raised:
            layer(q, q, q)
        return str(raised.value)

    run_ranks(2, work)


def test_residuals_of_a_codec_belong_to_the_group() -> None:
    """A layer that is bound anew sends what one that never sent anything sends."""
    x = inputs().unflatten(-1, (H, D)).transpose(1, 2)

    def gradient(layer: BlockSparseDistributed) -> Tensor:
        shard = layer.shard(x).requires_grad_()
        layer(shard, shard, shard).square().sum().backward()
        return shard.grad

    def work(communicator: Communicator) -> tuple[bool, bool]:
        config = DistributedConfig(gradient_codec={"name": "topk", "params": {"density": 0.1}})
        layer = BlockSparseDistributed(config, **PATTERNS[1]).bind(communicator)
        first, second = gradient(layer), gradient(layer)
        again = gradient(layer.bind(communicator))
        return torch.equal(first, again), torch.equal(first, second)

    assert run_ranks(2, work) == [(True, False), (True, False)]
