"""A learned pattern over ranks chooses, computes and learns what it does on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockSparseAdaptive, BlockSparseDistributed, DistributedConfig
from raybsa.comm import Communicator
from raybsa.variants.selector import selector_loss
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks

SIZES: dict[str, Any] = {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}


def whole(tokens: int = 250) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def on_one_device(method: str, density: float, causal: bool) -> BlockSparseAdaptive:
    model = BlockSparseAdaptive(**SIZES, density=density, block_size=16, causal=causal, method=method)
    return model.double()


def on_a_rank(alone: BlockSparseAdaptive, communicator: Communicator) -> BlockSparseDistributed:
    """With the gate of ``alone``: threads share one random generator."""
    pattern = {"name": "adaptive", "params": {"method": alone.source.method}}
    rules, density = alone.source.rules, alone.source.density.end
    options = {"density": density, "block_size": rules.block_size, "causal": rules.causal}
    model = BlockSparseDistributed(DistributedConfig(partition="striped"), pattern=pattern, **SIZES, **options).double()
    model.load_state_dict(alone.state_dict())
    return model.bind(communicator)


@pytest.mark.parametrize("method", ["distill", "bias", "mean-pool"])
@pytest.mark.parametrize(
    ("world_size", "density", "causal"), [(1, 0.3, True), (3, 0.3, True), (2, 0.3, False), (3, 1.0, True)]
)
def test_ranks_get_the_rows_and_gradients_of_one_device(method, world_size, density, causal):
    alone = on_one_device(method, density, causal)
    leaves = [x.requires_grad_() for x in whole()]
    out = alone(*leaves)
    out.square().sum().backward()

    def work(communicator: Communicator) -> tuple[Tensor, ...]:
        model = on_a_rank(alone, communicator)
        inputs = [x.requires_grad_() for x in whole()]
        rows = model(*(model.shard(x) for x in inputs))
        rows.square().sum().backward()
        gate = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        return model.gather(rows), *(x.grad for x in inputs), *gate

    results = run_ranks(world_size, work)
    for got in results:
        assert relative_error(got[0], out) <= 1e-10
    sums = [sum(parts) for parts in zip(*(got[1:] for got in results), strict=True)]
    wanted = [x.grad for x in leaves]
    wanted += [p.grad if p.grad is not None else torch.zeros_like(p) for p in alone.parameters()]
    for got, want in zip(sums, wanted, strict=True):
        assert relative_error(got, want) <= 1e-9


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_the_ranks_losses_add_up_to_the_divergence_over_all_kept_blocks(density):
    module = on_one_device("distill", density, True)

    def work(communicator: Communicator) -> tuple[Tensor, ...]:
        model = on_a_rank(module, communicator)
        model(*(model.shard(x) for x in whole()))
        loss = selector_loss(model)
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters())

    alone, *together = (
        [sum(parts) for parts in zip(*run_ranks(world_size, work), strict=True)] for world_size in (1, 2, 3)
    )
    assert alone[0] > 0
    for sums in together:
        for got, want in zip(sums, alone, strict=True):
            assert relative_error(got, want) <= 1e-9


def test_what_does_not_run_over_ranks_is_refused():
    pattern = {"name": "adaptive", "params": {"method": "compressed"}}
    with pytest.raises(ValueError, match="distill, bias or mean-pool, got 'compressed'"):
        BlockSparseDistributed(pattern=pattern, num_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="needs num_heads and head_dim"):
        BlockSparseDistributed(pattern="adaptive")
