"""What stands beside our ring: dense attention on one device, and torch's rings, which a CPU refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from raybsa.comm import Communicator
from raybsa.kernels.peers import dense
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks import context_parallel, ring, ring_peers
from raybsa.tasks.ring import measure_rank
from raybsa.tasks.ring_contender import Contender, calls_of, reference_errors, small_of
from raybsa.tasks.ring_longest import measure_longest
from raybsa.tasks.ring_peers import MAKERS, measure_ring_peer, why_not
from tests.ranks import run_ranks


def asking(name: str, *, family: str = "dense", world_size: int = 1, block_size: int = 64) -> TrialSpec:
    attention = AttentionSpec("distributed", PatternSpec(family), None if family == "dense" else 0.3, block_size, name)
    shape = {"seq_len": 512, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "causal": True}
    return TrialSpec("ring_peers", (attention,), **shape, task_params={"world_size": world_size})


OWN = replace(asking("auto", family="sink_window"), task="ring", task_params={"single": False})


def test_dense_attention_on_one_device_is_checked_and_then_timed() -> None:
    report = measure_ring_peer(asking("sdpa-flash"), Communicator(), None, repeats=3, budget_s=0.01)
    assert report.errors is not None
    assert max(report.errors) < 1e-5
    assert [len(report.times_ms[step]) for step in ("forward", "forward_backward")] == [3, 3]
    assert report.peak_bytes > 0
    assert report.forward_bytes == 0


def test_results_that_are_not_attention_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "attend", lambda name, q, k, v, causal: 1.1 * q * k.sum() * v.sum())
    monkeypatch.setitem(MAKERS, "sdpa-flash", partial(ring_peers.on_one_device, line="sdpa-flash"))
    with pytest.raises(ArithmeticError, match=r"sdpa-flash is off by .* on 512"):
        measure_ring_peer(asking("sdpa-flash"), Communicator(), None)


def test_a_rank_that_is_wrong_is_seen_by_all() -> None:
    small = small_of(replace(OWN, seq_len=4096), 2)

    def errors(communicator: Communicator) -> tuple[float, float]:
        tokens = torch.arange(small.seq_len).chunk(2)[communicator.rank]
        wrong = Contender(tokens, lambda q, k, v: q * float(communicator.rank) + 0 * (k.sum() + v.sum()))
        return reference_errors(wrong, small, communicator)

    first, second = run_ranks(2, errors)
    assert first == second
    assert first[0] > 0.5


def test_a_ring_without_a_single_process_is_compared_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "peak_bytes", lambda step, device: bool(step()))  # two threads have one profiler
    spec = replace(OWN, task_params={"world_size": 2, "single": False})
    reports = run_ranks(2, lambda communicator: measure_rank(spec, communicator, repeats=3, budget_s=0.01))
    assert all(report.errors is not None and max(report.errors) < 1e-5 for report in reports)
    assert set(reports[0].times_ms) == {"forward", "forward_backward"}
    assert reports[0].forward_bytes + reports[1].forward_bytes > 0


def test_a_step_is_tried_once_for_its_memory_and_once_for_its_time() -> None:
    report = measure_longest(replace(OWN, task="ring_longest"), Communicator())
    assert len(report.times_ms["forward_backward"]) == 1
    assert report.peak_bytes > 512 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("spec", "device", "why"),
    [
        (asking("torch-cp-flex", family="sink_window", world_size=2), "cpu", "FlexAttention has no backward on cpu"),
        (asking("torch-cp-flash", world_size=2), "cpu", "torch's ring has no sharding rule for dense attention on cpu"),
        (asking("torch-cp-flash", family="sink_window"), "cuda", "torch-cp-flash is dense, this pattern is not"),
        (asking("sdpa-flash", world_size=2), "cuda", "sdpa-flash computes on one device, not on 2"),
        (asking("torch-cp-flex", family="sink_window"), "cuda", "masks in blocks of 128, not 64"),
        (asking("torch-cp-cudnn", world_size=4), "cuda", "torch deals multiples of 1024 tokens, not 512"),
        (asking("torch-cp-cudnn", world_size=2), "cuda", None),
        (asking("sdpa-flash"), "cpu", None),
    ],
)
def test_who_cannot_answer_says_why(spec: TrialSpec, device: str, why: str | None) -> None:
    said = why_not(spec, device)
    assert said is None if why is None else said is not None and why in said


def test_an_unknown_library_and_a_torch_without_context_parallelism_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got backend 'magi'"):
        why_not(asking("magi"), "cuda")
    monkeypatch.setattr(context_parallel, "_NEEDED", ("context_parallel", "_Renamed"))
    said = why_not(asking("torch-cp-cudnn", world_size=2), "cuda")
    assert said is not None
    assert "has no _Renamed in torch.distributed.tensor" in said


@pytest.fixture
def last_of_two() -> Iterator[object]:
    """The mesh of rank 1 of 2, by a group that sends nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_torchs_ring_says_which_tokens_a_rank_holds(last_of_two: object) -> None:
    spec = asking("torch-cp-flash", world_size=2)
    with MAKERS["torch-cp-flash"](spec, last_of_two) as contender:
        assert contender.tokens.tolist() == [*range(128, 384)], "the second and the third quarter"
        assert torch.nn.functional.scaled_dot_product_attention.__name__ == "inner_fn"
    assert torch.nn.functional.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
    assert calls_of(contender, spec, Communicator()).keys() == {"forward", "forward_backward"}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's, of its FlexAttention
@pytest.mark.parametrize(
    ("name", "family"), [("torch-cp-cudnn", "dense"), ("torch-cp-flash", "dense"), ("torch-cp-flex", "sink_window")]
)
def test_torchs_rings_are_attention_on_one_gpu(name: str, family: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from torch.distributed.device_mesh import init_device_mesh

    torch.cuda.set_device(0)  # as a rank does
    spec = replace(asking(name, family=family, block_size=128), head_dim=64, dtype="bfloat16", num_heads=8)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        communicator = Communicator(device="cuda:0")
        report = measure_ring_peer(spec, communicator, init_device_mesh("cuda", (1,)), repeats=3, budget_s=0.1)
    finally:
        dist.destroy_process_group()
    assert report.errors is not None
    assert max(report.errors) < 2e-2
