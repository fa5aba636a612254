"""Ring trials on real processes of this host: a measurement for each, or why there is none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from raybsa.comm import Communicator
from raybsa.results.record import Measurement, SeriesPoint
from raybsa.ring.timeline import from_series
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks import ring_calibration
from raybsa.tasks.ring import ring_params, ring_plan
from raybsa.tasks.ring_calibration import calls_within, measure_crowding
from raybsa.tasks.ring_rank import CROWDING, LINK, bind_to_core
from raybsa.tasks.ring_ranks import measure_rings
from tests.ranks import run_ranks

SPEC = TrialSpec(
    "ring",
    (AttentionSpec("distributed", PatternSpec("random"), 0.2, 32),),
    seq_len=512,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    task_params={"world_size": 2, "partition": "zigzag"},
)


def test_two_processes_measure_what_they_can_and_say_what_they_cannot() -> None:
    impossible = replace(SPEC, seq_len=32)
    (_, good), (asked, bad) = measure_rings([SPEC, impossible], device="cpu", repeats=3, budget_s=0.1)
    assert isinstance(good, Measurement)
    plan = ring_plan(SPEC)
    sent = plan.bytes_sent(2, 16, 4)
    assert (good.wire_forward_bytes, good.needed_forward_bytes, good.wire_bytes) == (sent, sent, 3 * sent)
    assert (good.world_size, good.partition, good.num_threads) == (2, "zigzag", 1)
    assert good.imbalance == plan.imbalance
    assert good.error_forward is not None
    assert good.error_forward < 1e-5
    assert good.error_gradient is not None
    assert good.error_gradient < 1e-5
    for ms in (good.forward_ms_p50, good.forward_backward_ms_p50, good.single_forward_ms_p50, good.peak_bytes):
        assert ms
    spans = from_series([SeriesPoint("trial", *point) for point in good.rank_curves], "trial")
    assert {(span.rank, span.phase) for span in spans if span.kind == "attention"} == {
        (rank, phase) for rank in (0, 1) for phase in ("forward", "backward")
    }
    assert len({nbytes for name, nbytes, _, _ in good.rank_curves if name == LINK}) >= 4
    (crowding,) = [value for name, ranks, _, value in good.rank_curves if (name, ranks) == (CROWDING, 2)]
    assert 0.3 < crowding < 10
    assert asked is impossible
    assert isinstance(bad, str)
    assert "world_size must lie in 1..1" in bad


def test_a_question_that_is_not_a_rings_is_named_before_anything_starts() -> None:
    assert ring_params(SPEC) == (2, "zigzag")
    assert ring_params(replace(SPEC, task_params={})) == (1, "balanced")
    with pytest.raises(ValueError, match="in task 'ring'"):
        list(measure_rings([replace(SPEC, task="speed")], device="cpu"))
    with pytest.raises(ValueError, match="got also \\['ranks'\\]"):
        list(measure_rings([replace(SPEC, task_params={"ranks": 2})], device="cpu"))


def test_ranks_are_as_crowded_as_the_slowest_over_many_calls_of_a_short_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {0: 0, 1: 0}
    ranks = threading.local()

    def kernel(*_: object, **__: object) -> None:
        made[ranks.rank] += 1

    def timed(call: Callable[[], object], communicator: Communicator, together: bool = True, **_: object) -> float:
        """10 ms a call alone; together 10 ms on rank 0 and 13 on rank 1."""
        before = made[communicator.rank]
        call()
        return (made[communicator.rank] - before) * (13.0 if communicator.rank and together else 10.0)

    def measured(communicator: Communicator) -> float:
        ranks.rank = communicator.rank
        return measure_crowding(SPEC, communicator, devices, repeats=2)

    monkeypatch.setattr(ring_calibration, "block_sparse_attention", kernel)
    monkeypatch.setattr(ring_calibration, "timed", timed)
    devices = 2
    assert run_ranks(2, measured) == [1.3, 1.0]
    assert made == {0: 3 + 2 * 2 * 10, 1: 3 + 2 * 10}, "10 calls make 100 ms"
    devices = 1
    assert run_ranks(2, measured)[0] == 2.6, "two ranks on one core also take turns"
    assert [calls_within(100.0, ms) for ms in (13.0, 50.0, 99.0, 100.0, 2000.0)] == [8, 2, 2, 1, 1]


def test_ranks_take_the_cores_in_turn() -> None:
    def core_of(rank: int) -> set[int]:
        bind_to_core(rank)
        return os.sched_getaffinity(0)

    cores = sorted(os.sched_getaffinity(0))
    for rank in range(len(cores) + 2):
        with ThreadPoolExecutor(1) as thread:  # only that thread is bound
            assert thread.submit(core_of, rank).result() == {cores[rank % len(cores)]}
    assert sorted(os.sched_getaffinity(0)) == cores
