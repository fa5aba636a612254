"""RingCoordinator: the Coordinator of trials whose sequence ranks share, on one ring of actors that stays warm.

A rank that is lost takes its trial to a fresh ring, a bounded number of times; a trial that raises is the trial's own
failure and is not tried again. The ring is alone on its devices while it is timed. While it trains it lets others time
theirs, in slices of a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from raybsa.cluster.causes import whose
from raybsa.cluster.coordinator import Coordinator, WorkerNotMade, last_line
from raybsa.cluster.crew import cause_of
from raybsa.cluster.resources import Say, Share
from raybsa.cluster.rings import ActorRing
from raybsa.comm import Broken
from raybsa.results.record import MACHINE, Measurement, Outcome
from raybsa.ring.timeline import Point
from raybsa.spec import UNTRAINED, TrialSpec
from raybsa.tasks.ring_rank import joined
from raybsa.tasks.sharded_trial import RankQuality

_SLICE_S = 1.0


@dataclass
class _UnderWay:
    """A trial that may be asked for more steps. ``seconds``: of the ring so far."""

    spec: TrialSpec
    measured: Measurement
    steps: int = 0
    seconds: float = 0.0


class RingCoordinator:
    """Runs trials of ``world_size`` ranks one after another; the ring is made on entering (``with``) or when needed.

    Args:
        world_size: ranks of every trial.
        share: what each rank owns.
        retries: how many times a trial whose ring lost a rank is given to a fresh one.
        wait_s: the longest wait for a ring to come up.
        trial_s: the longest that one attempt at a trial may take; its ring is then ended and the trial has failed.
        timing: ``repeats`` and ``budget_s``.
        group: a placement group with one bundle a rank; None lets Ray place them.
        say: where messages go.
    """

    def __init__(
        self,
        world_size: int,
        share: Share,
        *,
        retries: int = 2,
        wait_s: float = 60.0,
        trial_s: float = 1800.0,
        timing: dict[str, Any] | None = None,
        group: PlacementGroup | None = None,
        say: Say = print,
    ) -> None:
        self._world_size, self._share, self._say = world_size, share, say
        self._retries, self._trial_s = retries, trial_s
        self._make: dict[str, Any] = {"wait_s": wait_s, "limit_s": trial_s, "say": say, "group": group, "alone": False}
        self._timing = {"repeats": 20, "budget_s": 2.0, **(timing or {})}
        self._ring: ActorRing | None = None
        self._link: list[Point] = []
        self._last: _UnderWay | None = None

    def __enter__(self) -> RingCoordinator:
        """Makes the ring. Raises TooFewResources or WorkerNotMade when it does not come up."""
        try:
            self._ring_at_hand()
        except RayError as error:
            self.close()
            raise WorkerNotMade(self._not_made(error)) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the ring; safe to call twice."""
        if self._ring is not None:
            self._ring.close()
        self._ring = self._last = None

    def run(self, spec: TrialSpec, until: int | None = None) -> Outcome:
        """One trial, to its end or ``until`` so many training steps; a ring that still has it goes on from there.

        Raises:
            TooFewResources: a ring could not be had.
        """
        failures = 0
        while True:
            try:
                return Outcome(spec, self._answer(spec, until), None, failures)
            except TimeoutError:
                self.close()
                return Outcome(spec, None, f"took longer than {self._trial_s:g} s", failures, cause=MACHINE)
            except RayError as error:
                self.close()
                if isinstance(error, RayTaskError) and not isinstance(error.cause, Broken):
                    return Outcome(spec, None, cause_of(error), failures, cause=whose(error))
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    return Outcome(spec, None, f"WorkerNotMade: {self._not_made(error)}", failures, cause=MACHINE)
                failures += 1
                if failures > self._retries:
                    lost = f"its ring was lost {failures} times: {cause_of(error)}"
                    return Outcome(spec, None, lost, failures, cause=whose(error))
                self._say(f"a ring lost a rank, its trial goes to a fresh one (attempt {failures + 1})")

    def map(self, specs: Iterable[TrialSpec]) -> Iterator[Outcome]:
        """Each trial's outcome, in order."""
        return map(self.run, specs)

    # ---- for ourselves ---------------------------------------------------------------------------------------------

    def _ring_at_hand(self) -> ActorRing:
        if self._ring is None:
            self._ring = ActorRing(self._world_size, self._share, **self._make).__enter__()
            with self._ring.held(alone=True):
                self._link = self._ring.ask("link")[0]
        return self._ring

    def _not_made(self, error: RayError) -> str:
        return f"a ring of {self._world_size} ranks of {self._share} could not be made: {last_line(error)}"

    def _answer(self, spec: TrialSpec, until: int | None) -> Measurement:
        """What the ring measured, once it has done so many steps."""
        ring, begin = self._ring_at_hand(), time.monotonic()
        if self._last is None or self._last.spec != spec:
            self._last = None
            self._last = _UnderWay(spec, self._time(ring, spec))
        trial, measured = self._last, self._last.measured
        steps = 0 if spec.task in UNTRAINED else spec.train_steps if until is None else min(until, spec.train_steps)
        if steps:
            self._train(ring, trial, steps, begin + self._trial_s)
            with ring.held(alone=False):
                measured = _with_quality(measured, ring.ask("judge"))
        if until is None:
            self._last = None
        trial.seconds += time.monotonic() - begin
        return replace(measured, worker_seconds=trial.seconds)

    def _time(self, ring: ActorRing, spec: TrialSpec) -> Measurement:
        """Takes up a trial: its times, bytes and memory."""
        with ring.held(alone=False):
            ring.ask("begin", spec)
        with ring.held(alone=True):
            reports = ring.ask("time", self._timing["repeats"], self._timing["budget_s"])
        return joined(spec, reports, self._share.device, ring.devices, self._link)

    def _train(self, ring: ActorRing, trial: _UnderWay, until: int, deadline: float) -> None:
        """Steps in slices, between which others may time theirs."""
        count = 1
        while trial.steps < until:
            if time.monotonic() > deadline:
                raise TimeoutError
            step = min(until, trial.steps + count)
            begin = time.monotonic()
            with ring.held(alone=False):
                ring.ask("train", step)
            seconds = (time.monotonic() - begin) / (step - trial.steps)
            trial.steps, count = step, max(1, int(_SLICE_S / seconds))


def coordinator_of(
    world_size: int, share: Share, *, num_workers: int = 1, **options: Any
) -> Coordinator | RingCoordinator:
    """Who runs trials of so many ranks: ``num_workers`` of one at once, those of a ring one after another."""
    if world_size == 1:
        return Coordinator(share, num_workers=num_workers, **options)
    return RingCoordinator(world_size, share, **options)


def _with_quality(measured: Measurement, found: list[RankQuality]) -> Measurement:
    """The quality; to the bytes of a step's attention come those of the weights' gradients."""
    quality = found[0].quality
    return replace(
        measured,
        quality_name=quality.name,
        quality_goal=quality.goal,
        quality=quality.value,
        train_seconds=max(each.quality.train_seconds for each in found),
        trained_steps=quality.steps,
        curves=quality.curves,
        wire_bytes=measured.wire_bytes + sum(each.step_bytes for each in found),
    )
