"""Ring attention on 1 to 8 ranks gives the output and the gradients that one device gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockLayout, block_sparse_attention, patterns
from raybsa.comm import Communicator
from raybsa.gradients.catalog import build
from raybsa.patterns.catalog import CATALOG
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import STRATEGIES, partition_for
from raybsa.ring.plan import RingPlan
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


PARAMS = {
    "dilated": {"segment_lengths": [128, 512], "dilation_rates": [1, 3]},
    "document": {"lengths": [100, 300, 112]},
}


@dataclass(frozen=True)
class Case:
    """A sequence split over ranks; the id says all that is odd about it."""

    name: str
    tokens: int = 256
    block: int = 16
    kv_block: int = 16
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    groups: int = 1
    causal: bool = False
    kept: float = 0.3
    empty_rows: bool = False

    def layout(self) -> BlockLayout:
        rows, cols = -(-self.tokens // self.block), -(-self.tokens // self.kv_block)
        mask = torch.rand(self.groups, rows, cols) < self.kept
        if self.empty_rows:
            mask[:, ::3] = False
        return BlockLayout.from_dense(
            mask,
            q_len=self.tokens,
            kv_len=self.tokens,
            q_block_size=self.block,
            kv_block_size=self.kv_block,
            causal=self.causal,
        )


CASES = [
    Case("plain"),
    Case("causal-ragged", tokens=247, causal=True),
    Case("per-head-gqa-causal", heads=4, kv_heads=2, groups=4, causal=True),
    Case("per-sample-gqa-ragged", heads=4, kv_heads=2, groups=8, tokens=241),
    Case("shared-mqa", kv_heads=1, causal=True),
    Case("rows-with-nothing", empty_rows=True, groups=4, causal=True),
    Case("unequal-blocks-causal-ragged", block=8, kv_block=16, tokens=250, causal=True, groups=4),
    Case("tall-blocks", block=16, kv_block=8, groups=4),
    Case("almost-nothing", kept=0.02),
    Case("dense-causal", kept=1.1, causal=True),
    Case("odd-number-of-blocks", tokens=16 * 13, causal=True),
]


def whole_inputs(case: Case, layout: BlockLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v, grad_out = (
        torch.randn(case.batch, heads, case.tokens, 16, dtype=dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    grad_lse = torch.randn(case.batch, case.heads, case.tokens, dtype=dtype)
    return {"q": q, "k": k, "v": v, "grad_out": grad_out, "grad_lse": grad_lse}


def backward(out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> None:
    finite = torch.where(lse == -math.inf, 0.0, lse)
    ((out * grad_out).sum() + (finite * grad_lse).sum()).backward()


def on_one_device(inputs: dict[str, Tensor], layout: BlockLayout, **options: Any) -> dict[str, Tensor]:
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in ("q", "k", "v")}
    if "block_bias" in options:
        leaves["block_bias"] = options["block_bias"] = options["block_bias"].detach().clone().requires_grad_()
    out, lse = block_sparse_attention(
        *(leaves[name] for name in "qkv"), layout, return_lse=True, backend="blocked", **options
    )
    backward(out, lse, inputs["grad_out"], inputs["grad_lse"])
    grads = {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {"out": out.detach(), "lse": lse.detach()} | grads


def on_ranks(inputs: dict[str, Tensor], plan: RingPlan, world_size: int, **options: Any) -> dict[str, Tensor]:
    """The same from a ring: shards go in, the joined whole comes out (block_bias in the whole layout's order)."""
    bias, segments = options.pop("block_bias", None), options.pop("segment_ids", None)
    share = plan.partition.shard

    def work(communicator: Communicator) -> dict[str, Tensor]:
        rank, given = communicator.rank, dict(options)
        leaves = {name: laid_out(share(inputs[name], rank), rank).requires_grad_() for name in ("q", "k", "v")}
        if bias is not None:
            rows = (plan.q_owner == rank).nonzero()[:, 0]
            index = plan.layout.select(rows, None, return_index=True)[1]
            given["block_bias"] = leaves["block_bias"] = bias[index].clone().requires_grad_()
        if segments is not None:
            given["segment_ids"] = share(segments, rank, 1)
        out, lse = ring_attention(*(leaves[n] for n in "qkv"), plan, communicator, return_lse=True, **given)
        backward(out, lse, share(inputs["grad_out"], rank), share(inputs["grad_lse"], rank))
        results = {"out": out.detach(), "lse": lse.detach()}
        if bias is not None:
            results["grad block_bias"] = torch.zeros_like(bias).index_copy_(0, index, leaves["block_bias"].grad)
        return results | {f"grad {name}": leaves[name].grad for name in ("q", "k", "v")}

    parts = run_ranks(world_size, work)
    joined = {name: plan.partition.join([part[name] for part in parts]) for name in parts[0] if "bias" not in name}
    return joined | {name: sum(part[name] for part in parts) for name in parts[0] if "bias" in name}


def laid_out(x: Tensor, rank: int) -> Tensor:
    """A copy, (B, H, S, D) in memory or, on every other rank, (B, S, H, D) as a projection leaves it."""
    return (
        x.transpose(1, 2).contiguous().transpose(1, 2) if rank % 2 else x.clone(memory_format=torch.contiguous_format)
    )


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], budget: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        hidden = wanted[name] == -math.inf
        assert torch.equal(hidden, got[name] == -math.inf), f"{name}: other rows see nothing"
        error = relative_error(got[name].masked_fill(hidden, 0.0), wanted[name].masked_fill(hidden, 0.0))
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.0e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_ring_equals_one_device(case: Case, world_size: int) -> None:
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float64)
    partition = partition_for([layout], world_size)
    plan = RingPlan(layout, partition, queries_per_kv=case.heads // case.kv_heads)
    assert_same(on_ranks(inputs, plan, world_size), on_one_device(inputs, layout), TOLERANCE[torch.float64])


def test_ranks_whose_queries_see_none_of_their_own_keys() -> None:
    case = Case("the other diagonal", kv_heads=2)
    mask = torch.eye(16, dtype=torch.bool).flip(1)[None]
    layout = BlockLayout.from_dense(mask, q_len=256, kv_len=256, q_block_size=16)
    plan = RingPlan(layout, partition_for([layout], 2, strategy="contiguous"), queries_per_kv=2)
    assert [len(plan.of_rank(rank).hops[0].q_blocks) for rank in range(2)] == [0, 0]
    inputs = whole_inputs(case, layout, torch.float64)
    assert_same(on_ranks(inputs, plan, 2), on_one_device(inputs, layout), TOLERANCE[torch.float64])


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_partition_gives_the_same(strategy: str) -> None:
    case = Case("strategies", tokens=16 * 23 + 5, groups=4, causal=True)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float64)
    plan = RingPlan(layout, partition_for([layout], 3, strategy=strategy))
    assert_same(on_ranks(inputs, plan, 3), on_one_device(inputs, layout), TOLERANCE[torch.float64])


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("name", [name for name in CATALOG if name not in ("blocks", "union", "per_head")])
def test_every_pattern_family_gives_the_same(name: str, causal: bool) -> None:
    rule = patterns.build({"name": name, "params": PARAMS.get(name, {})})
    layout = rule.layout(512, num_heads=2, q_block_size=16, causal=causal, density=0.2, or_least=True)
    case = Case(name, tokens=512, heads=2, kv_heads=2, batch=1)
    inputs = whole_inputs(case, layout, torch.float64)
    plan = RingPlan(layout, partition_for([layout], 4))
    assert_same(on_ranks(inputs, plan, 4), on_one_device(inputs, layout), TOLERANCE[torch.float64])


def test_error_does_not_grow_with_the_world_size() -> None:
    case = Case("dense", tokens=512, kept=1.1, causal=True, batch=1)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float32)
    exact = on_one_device({name: x.double() for name, x in inputs.items()}, layout)
    errors = {}
    for world_size in (1, 8):
        got = on_ranks(inputs, RingPlan(layout, partition_for([layout], world_size)), world_size)
        assert_same(got, exact, TOLERANCE[torch.float32])
        errors[world_size] = max(relative_error(got[name], exact[name]) for name in exact)
    assert errors[8] <= 2 * errors[1] + 2e-7, errors


@pytest.mark.parametrize("world_size", [2, 3])
def test_bias_segments_dropout_and_scale_together_equal_one_device(world_size: int) -> None:
    case = Case("all", tokens=250, causal=True, groups=8, kv_heads=2)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float64)
    plan = RingPlan(layout, partition_for([layout], world_size), queries_per_kv=2)
    segments = (torch.arange(250) * 3 // 250).expand(2, -1).contiguous()
    options = {"block_bias": torch.randn(layout.nnz_blocks).double(), "dropout_p": 0.2, "seed": 5, "scale": 0.4}
    wanted = on_one_device(inputs, layout, segment_ids=(segments, segments), **options)
    got = on_ranks(inputs, plan, world_size, segment_ids=segments, **options)
    assert_same(got, wanted, TOLERANCE[torch.float64])


def test_low_precision_rings_stay_near_one_device() -> None:
    case = Case("bf16", tokens=512, causal=True, groups=4)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float32)
    exact = on_one_device({name: x.double() for name, x in inputs.items()}, layout)
    low = {name: x.bfloat16() if name != "grad_lse" else x for name, x in inputs.items()}
    alone = on_one_device(low, layout)
    ring = on_ranks(low, RingPlan(layout, partition_for([layout], 4)), 4)
    for name in exact:
        hidden = exact[name] == -math.inf
        error, budget = (
            relative_error(x[name].masked_fill(hidden, 0.0), exact[name].masked_fill(hidden, 0.0))
            for x in (ring, alone)
        )
        assert error <= 2 * budget, f"{name}: error {error:.2e}, one device's {budget:.2e}"


def test_gradients_may_travel_compressed() -> None:
    case = Case("wire", tokens=256, causal=True)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float32)
    plan = RingPlan(layout, partition_for([layout], 4))
    wanted = on_one_device(inputs, layout)
    exact = on_ranks(inputs, plan, 4)
    rounded = on_ranks(inputs, plan, 4, gradient_codec=build("bf16"))
    assert torch.equal(exact["grad q"], rounded["grad q"])
    errors = relative_error(exact["grad k"], wanted["grad k"]), relative_error(rounded["grad k"], wanted["grad k"])
    assert errors[0] < 1e-5 < errors[1] < 1e-2, errors


def test_gradcheck_through_a_ring_of_one() -> None:
    case = Case("gradcheck", tokens=24, block=8, kv_block=8, heads=2, kv_heads=1, batch=1, causal=True, kept=0.7)
    layout = case.layout()
    plan = RingPlan(layout, partition_for([layout], 1), queries_per_kv=2)
    inputs = whole_inputs(case, layout, torch.float64)
    leaves = [inputs[name][..., :4].requires_grad_() for name in ("q", "k", "v")]  # one call a number
    bias = torch.randn(layout.nnz_blocks, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: ring_attention(q, k, v, plan, Communicator(), block_bias=b), (*leaves, bias)
    )


def test_autocast_and_checkpointing_work_through_a_ring() -> None:
    case = Case("autocast", tokens=128, causal=True)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float32)
    plan = RingPlan(layout, partition_for([layout], 2))

    def work(communicator: Communicator) -> tuple[torch.dtype, Tensor, Tensor]:
        grads = []
        for checkpointed in (False, True):
            leaves = [plan.partition.shard(inputs[n], communicator.rank).clone().requires_grad_() for n in "qkv"]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                call = lambda q, k, v: ring_attention(q, k, v, plan, communicator)  # noqa: E731
                if checkpointed:
                    out = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
                else:
                    out = call(*leaves)
            out.float().sum().backward()
            grads.append(leaves[2].grad)
        return out.dtype, *grads

    for dtype, plain, checkpointed in run_ranks(2, work):
        assert dtype == torch.bfloat16
        assert torch.equal(plain, checkpointed)


@pytest.fixture
def unset_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.usefixtures("unset_memory_is_nan")
def test_what_was_not_sent_for_a_head_never_reaches_a_result(backend: str) -> None:
    case = Case("per-head-ragged", tokens=200, groups=4, kept=0.15)
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float64)
    q, k, v, grad_out = (inputs[name] for name in ("q", "k", "v", "grad_out"))
    partition = partition_for([layout], 3)
    plan = RingPlan(layout, partition)

    def work(communicator: Communicator) -> list[Tensor]:
        own = [partition.shard(x, communicator.rank, 2).clone().requires_grad_() for x in (q, k, v)]
        out = ring_attention(*own, plan, communicator, backend=backend)
        assert isinstance(out, Tensor)
        out.backward(partition.shard(grad_out, communicator.rank, 2))
        return [out.detach(), *(x.grad for x in own if x.grad is not None)]

    ranks = run_ranks(3, work)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = block_sparse_attention(*leaves, layout, backend="reference")
    wanted.backward(grad_out)
    for parts, whole in zip(zip(*ranks, strict=True), [wanted, *(x.grad for x in leaves)], strict=True):
        assert relative_error(partition.join(list(parts), 2), whole) <= 1e-10


def test_backward_inside_autocast_gives_the_gradients_of_backward_outside() -> None:
    case = Case("plain")
    layout = case.layout()
    inputs = whole_inputs(case, layout, torch.float32)
    plan = RingPlan(layout, partition_for([layout], 2))

    def work(communicator: Communicator, inside: bool) -> list[Tensor]:
        own = [plan.partition.shard(inputs[n], communicator.rank, 2).clone().requires_grad_() for n in "qkv"]
        out = ring_attention(*own, plan, communicator)
        assert isinstance(out, Tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward(plan.partition.shard(inputs["grad_out"], communicator.rank, 2))
        return [x.grad for x in own if x.grad is not None]

    outside, inside = (run_ranks(2, lambda c, where=where: work(c, where)) for where in (False, True))
    assert all(torch.equal(a, b) for x, y in zip(outside, inside, strict=True) for a, b in zip(x, y, strict=True))
