"""What is decided about trials whose sequence ranks share: fresh rings, time limits, slices, without Ray's cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from raybsa.cluster import ring_coordinator
from raybsa.cluster.coordinator import Coordinator, WorkerNotMade
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.cluster.ring_coordinator import RingCoordinator, coordinator_of
from raybsa.comm import PeerLost
from raybsa.results.record import Measurement
from raybsa.spec import AttentionSpec, PatternSpec, Ranks, TrialSpec
from raybsa.tasks.sharded_trial import RankQuality
from raybsa.tasks.training import Quality

ATTENTION = AttentionSpec("distributed", PatternSpec("random"), 0.5, 16)
SPEC = TrialSpec("byte_lm", (ATTENTION,), train_steps=90).over(Ranks(2))


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("call", f"Traceback (most recent call last):\n{type(cause).__name__}: {cause}", cause)


class Rings:
    """Rings of two that say what they were asked; ``script``: method -> errors that it raises first."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.script: dict[str, list[Exception]] = {}
        self.told: list[str] = []

    def make(self, world_size: int, share: Share, **options: Any) -> Any:
        ring = SimpleNamespace(devices=2, options=options, held=self.held, ask=self.ask, alive=True)
        ring.close = lambda: setattr(ring, "alive", False)
        ring.__enter__ = lambda: self.enter(ring)
        return ring

    def enter(self, ring: Any) -> Any:
        self.made.append(ring)
        if self.script.get("made"):
            raise self.script["made"].pop(0)
        return ring

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        self.told.append("alone" if alone else "shared")
        yield
        self.told.append("free")

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        self.told.append(" ".join([method, *(str(x) for x in arguments if isinstance(x, int))]))
        if self.script.get(method):
            raise self.script[method].pop(0)
        found = Quality("bits_per_byte", "min", 2.0, 1.5, (), 90)
        answers = {"judge": [RankQuality(found, 100), RankQuality(replace(found, train_seconds=2.5), 100)]}
        return answers.get(method, [[], []])


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> Rings:
    made = Rings()
    monkeypatch.setattr(ring_coordinator, "ActorRing", made.make)
    measurement = Measurement(forward_ms_p50=1.0, wire_bytes=1000)
    monkeypatch.setattr(ring_coordinator, "joined", lambda *arguments: measurement)
    return made


def coordinator(**options: Any) -> RingCoordinator:
    return RingCoordinator(2, Share(), timing={"repeats": 3, "budget_s": 0.1}, say=lambda text: None, **options)


def test_a_ring_is_timed_alone_trains_beside_others_and_goes_on_where_it_was(rings: Rings) -> None:
    hands = coordinator()
    timed = hands.run(SPEC, 0).measurement
    assert timed is not None
    assert (timed.wire_bytes, timed.quality) == (1000, None)
    assert rings.told == ["alone", "link", "free", "shared", "begin", "free", "alone", "time 3", "free"]
    rings.told.clear()
    done = hands.run(SPEC).measurement
    assert done is not None
    assert (done.quality, done.train_seconds, done.trained_steps) == (2.0, 2.5, 90)
    assert done.wire_bytes == 1200, "a step's attention, and the weights' gradients of both ranks"
    assert rings.told[:3] == ["shared", "train 1", "free"]
    assert rings.told[-6:] == ["shared", "train 90", "free", "shared", "judge", "free"]
    rings.told.clear()
    hands.run(SPEC)
    assert rings.told[1] == "begin", "a question that was asked to its end begins anew"
    assert len(rings.made) == 1, "the ring stays warm"


@pytest.mark.parametrize("error", [ActorDiedError(), raised(PeerLost("rank 0 lost a peer"))], ids=["died", "lost"])
def test_a_lost_rank_takes_its_trial_to_a_fresh_ring_a_bounded_number_of_times(rings: Rings, error: Exception) -> None:
    rings.script["train"] = [error]
    outcome = coordinator(retries=2).run(SPEC)
    assert (outcome.error, outcome.failures) == (None, 1)
    assert [ring.alive for ring in rings.made] == [False, True]
    rings.script["train"] = [error] * 3
    failed = coordinator(retries=2).run(SPEC)
    assert failed.failures == 3
    assert failed.error is not None
    assert failed.error.startswith("its ring was lost 3 times: ")


def test_a_question_that_raises_fails_at_once_and_the_next_has_a_fresh_ring(rings: Rings) -> None:
    rings.script["begin"] = [raised(ValueError("no such thing"))]
    bad, good = coordinator().map([SPEC, SPEC])
    assert (bad.error, bad.failures) == ("ValueError: no such thing", 0)
    assert good.error is None
    assert [ring.alive for ring in rings.made] == [False, True]


def test_a_question_that_takes_too_long_has_failed(rings: Rings) -> None:
    rings.script["time"] = [TimeoutError()]
    outcome = coordinator(trial_s=7.0).run(SPEC)
    assert outcome.error == "took longer than 7 s"
    assert [ring.alive for ring in rings.made] == [False]
    late = coordinator(trial_s=-1.0).run(SPEC)
    assert late.error == "took longer than -1 s", "slices are added up"


def test_a_ring_that_cannot_be_made_says_why_and_one_without_room_is_the_callers(rings: Rings) -> None:
    never = ActorDiedError(raised(ImportError("no libfoo on this node")))
    why = r"a ring of 2 ranks of 1 CPU and 0 GPU could not be made: .*no libfoo on this node"
    rings.script["made"] = [never]
    outcome = coordinator().run(SPEC)
    assert outcome.error is not None
    assert re.match(f"WorkerNotMade: {why}", outcome.error)
    for method in ("made", "link"):
        rings.script[method] = [never]
        with pytest.raises(WorkerNotMade, match=why):
            coordinator().__enter__()
    assert not any(ring.alive for ring in rings.made[2:])
    rings.script["link"] = [ActorDiedError()]
    assert coordinator().run(SPEC).failures == 1, "one that is lost on its way is lost, not impossible"
    rings.script["made"] = [TooFewResources("2 workers wanted")]
    with pytest.raises(TooFewResources), coordinator():
        pass


def test_who_runs_a_question_follows_from_its_ranks() -> None:
    assert isinstance(coordinator_of(1, Share(), num_workers=2), Coordinator)
    assert isinstance(coordinator_of(2, Share(), num_workers=2), RingCoordinator)
