"""Ring trials on Ray actors: the rows of the ring suite, and a fresh ring after one that failed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from raybsa.cluster import rings
from raybsa.cluster.resources import Share
from raybsa.cluster.rings import RingActor, measure_rings_on_actors
from raybsa.cluster.versions import versions
from raybsa.experiments.recording import Run, record_of
from raybsa.experiments.suites import SUITES
from raybsa.results.record import Measurement, Outcome
from raybsa.tasks.ring import ring_plan
from raybsa.tasks.ring_rank import CROWDING, LINK, joined

ONE, _, TWO, _ = SUITES["ring-quick"]()


@pytest.mark.cluster
@pytest.mark.usefixtures("everything_is_given_back")
def test_two_actors_form_a_ring_and_answer_as_the_processes_of_the_ring_suite_do() -> None:
    impossible = replace(TWO, seq_len=16)
    (asked, good), (_, bad) = measure_rings_on_actors([TWO, impossible], Share(), repeats=3, budget_s=0.1)
    assert asked is TWO
    assert isinstance(good, Measurement)
    plan = ring_plan(TWO)
    assert good.wire_forward_bytes == plan.bytes_sent(2, 16, 4) == good.needed_forward_bytes
    assert (good.world_size, good.num_threads, good.device, good.partition) == (2, 1, "cpu", "balanced")
    assert good.error_forward is not None
    assert good.error_forward < 1e-5
    assert good.forward_backward_ms_p50
    assert good.single_forward_backward_ms_p50
    assert {LINK, CROWDING} < {name for name, *_ in good.rank_curves}
    record = record_of(Outcome(TWO, good, None, 0), Run.start("benchmark"), "trial")
    assert (record.task, record.variant, record.status) == ("ring", "distributed", "ok")
    assert isinstance(bad, str)
    assert bad.startswith("ValueError: world_size must lie in 1..1")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_actor_takes_its_place_on_the_device_it_owns(device: str) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True)
    actor = RingActor(versions(), device, 1)
    assert actor.join(0, 1, "127.0.0.1", store.port, False) >= 1
    try:
        report = actor.call("measure", ONE, 1, 0.1)
    finally:
        actor.call("close")
    assert joined(ONE, [report], device, 1, ()).device == device
    assert report.host


def test_a_ring_that_failed_costs_one_trial_and_every_world_size_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Ring:
        devices = 2

        def __init__(self, world_size: int, share: Share, **_: object) -> None:
            made.append(world_size)

        def __enter__(self) -> Ring:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ask(self, method: str, *arguments: Any) -> list[Any]:
            if method == "measure" and arguments[0].seq_len == 99:
                raise TimeoutError("took longer than 7 s")
            return [f"{method} {arguments[0].seq_len}"]

    monkeypatch.setattr(rings, "ActorRing", Ring)
    monkeypatch.setattr(rings, "joined", lambda spec, reports, device, devices, calibration: reports[0])
    asked = [replace(TWO, seq_len=seq_len) for seq_len in (64, 99, 128)] + [replace(ONE, seq_len=32)]
    answers = [answer for _, answer in measure_rings_on_actors(asked, Share())]
    assert answers == ["measure 64", "TimeoutError: took longer than 7 s", "measure 128", "measure 32"]
    assert made == [2, 2, 1]
    with pytest.raises(ValueError, match="a ring has at least one rank, got world_size 0"):
        next(measure_rings_on_actors([replace(TWO, task_params={"world_size": 0})], Share()))
