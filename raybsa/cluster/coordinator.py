"""Coordinator: independent workers as Ray actors, and the one place that decides what a failure means.

A worker that dies takes its trial to a fresh worker, a bounded number of times; a trial that raises is the trial's own
failure and is not tried again. Waits for resources are bounded and say what is missing. Actors are never detached:
they end with the coordinator, with the process that made it, and with ``ray job stop``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raybsa.results.record import Measurement
from raybsa.spec import TrialSpec

_SAY_EVERY_S = 5.0

Say = Callable[[str], None]
MakeWorker = Callable[[str, dict[str, Any]], Any]


class TooFewResources(RuntimeError):
    """The cluster did not give what a worker needs in time; the message says what was wanted and what there is."""


@dataclass(frozen=True)
class Share:
    """What one worker owns: whole CPUs (its threads), and one GPU or none."""

    num_cpus: int = 1
    num_gpus: int = 0

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": float(self.num_cpus)} | ({"GPU": float(self.num_gpus)} if self.num_gpus else {})

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with a measurement or with an error. ``failures`` counts the workers that died under it."""

    spec: TrialSpec
    measurement: Measurement | None
    error: str | None
    failures: int


@dataclass
class _Flight:
    """A trial under way."""

    spec: TrialSpec
    failures: int
    deadline: float


def make_worker(device: str, arguments: dict[str, Any]) -> Any:
    """A Worker in the process that will run it: only there is torch imported."""
    from raybsa.cluster.worker import Worker

    return Worker(device, **arguments)


class _Host:
    """The actor: holds one worker and passes calls through."""

    def __init__(self, make: MakeWorker, device: str, arguments: dict[str, Any]) -> None:
        self._worker = make(device, arguments)

    def describe(self) -> str:
        return self._worker.describe()

    def run(self, spec: TrialSpec) -> Measurement:
        return self._worker.run(spec)


class Coordinator:
    """Runs trials on ``num_workers`` warm workers. Use it as a context manager.

    Args:
        share: what each worker owns.
        num_workers: how many trials run at once.
        retries: how many times a trial whose worker died is given to a fresh one.
        wait_s: the longest wait for a worker to come up.
        trial_s: the longest that one attempt at a trial may take; its worker is then killed and the trial has failed.
        timing: arguments of the workers (``repeats``, ``budget_s``).
        make: makes the worker inside its actor: ``make(device, arguments)`` has ``describe()`` and ``run(spec)``.
        group: a placement group whose bundles ``first_bundle``, ``first_bundle + 1``, … the workers take.
        say: where messages go.

    Raises:
        TooFewResources: on entering, when a worker does not come up within ``wait_s``.
    """

    def __init__(
        self,
        share: Share,
        *,
        num_workers: int = 1,
        retries: int = 2,
        wait_s: float = 60.0,
        trial_s: float = 1800.0,
        timing: dict[str, Any] | None = None,
        make: MakeWorker = make_worker,
        group: PlacementGroup | None = None,
        first_bundle: int = 0,
        say: Say = print,
    ) -> None:
        self._share, self._retries, self._wait_s, self._trial_s, self._say = share, retries, wait_s, trial_s, say
        self._slots = range(num_workers)
        self._group, self._first_bundle = group, first_bundle
        self._make, self._arguments = make, {"num_threads": share.num_cpus, **(timing or {})}
        self._actors: dict[int, Any] = {}

    def __enter__(self) -> Coordinator:
        try:
            self._start(self._slots)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills every worker; safe to call twice."""
        for slot in list(self._actors):
            self._kill(slot)

    def run(self, spec: TrialSpec) -> Outcome:
        """One trial, to its end."""
        (outcome,) = self.map([spec])
        return outcome

    def map(self, specs: Iterable[TrialSpec]) -> Iterator[Outcome]:
        """Each trial's outcome as it comes, at most ``num_workers`` under way. Specs are drawn as workers come free."""
        waiting = iter(specs)
        flights: dict[Any, tuple[int, _Flight]] = {}
        try:
            for slot, spec in zip(self._slots, islice(waiting, len(self._slots)), strict=False):
                flights |= self._launch(slot, spec)
            while flights:
                reference = self._next(flights)
                slot, flight = flights.pop(reference)
                outcome = self._land(reference, slot, flight)
                if outcome is None:
                    flights |= self._launch(slot, flight.spec, flight.failures + 1)
                    continue
                yield outcome
                for spec in islice(waiting, 1):
                    flights |= self._launch(slot, spec)
        finally:
            for slot, _ in flights.values():
                self._kill(slot)

    # ---- trials ------------------------------------------------------------------------------------------------

    def _launch(self, slot: int, spec: TrialSpec, failures: int = 0) -> dict[Any, tuple[int, _Flight]]:
        if slot not in self._actors:
            self._start([slot])
        flight = _Flight(spec, failures, time.monotonic() + self._trial_s)
        return {self._actors[slot].run.remote(spec): (slot, flight)}

    def _next(self, flights: dict[Any, tuple[int, _Flight]]) -> Any:
        """The first trial that is over, or the one whose time is."""
        soonest = min(flights, key=lambda reference: flights[reference][1].deadline)
        left = max(0.0, flights[soonest][1].deadline - time.monotonic())
        ready, _ = ray.wait(list(flights), num_returns=1, timeout=left)
        return ready[0] if ready else soonest

    def _land(self, reference: Any, slot: int, flight: _Flight) -> Outcome | None:
        """The trial's outcome; None where it should go to a fresh worker."""
        try:
            return Outcome(flight.spec, ray.get(reference, timeout=0), None, flight.failures)
        except ray.exceptions.GetTimeoutError:
            self._kill(slot)
            return Outcome(flight.spec, None, f"took longer than {self._trial_s:g} s", flight.failures)
        except (RayActorError, WorkerCrashedError) as error:
            self._kill(slot)
            if flight.failures < self._retries:
                self._say(f"a worker died, its trial goes to a fresh one (attempt {flight.failures + 2})")
                return None
            died = f"its worker died {flight.failures + 1} times, the last time: {_first_line(error)}"
            return Outcome(flight.spec, None, died, flight.failures + 1)
        except RayTaskError as error:
            if self._share.num_gpus:
                self._kill(slot)  # a CUDA error may have left the process unusable
            return Outcome(flight.spec, None, _cause(error), flight.failures)

    # ---- workers -----------------------------------------------------------------------------------------------

    def _start(self, slots: Iterable[int]) -> None:
        """Makes the workers of ``slots`` and waits until all are up."""
        pending = {}
        for slot in slots:
            options: dict[str, Any] = {"num_cpus": self._share.num_cpus, "num_gpus": self._share.num_gpus}
            if self._group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=self._first_bundle + slot
                )
            host: Any = ray.remote(_Host)
            actor = host.options(**options).remote(self._make, self._share.device, self._arguments)
            self._actors[slot] = actor
            pending[actor.describe.remote()] = slot
        wait_for(list(pending), [self._share.bundle] * len(pending), self._wait_s, self._say)
        ray.get(list(pending))

    def _kill(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        if actor is not None and ray.is_initialized():
            ray.kill(actor)


def await_resources(bundles: list[dict[str, float]], wait_s: float, say: Say = print) -> None:
    """Returns once the cluster can hold all ``bundles`` at the same time.

    Raises:
        TooFewResources: it could not within ``wait_s`` seconds.
    """
    group = placement_group(bundles)
    try:
        wait_for([group.ready()], bundles, wait_s, say)
    finally:
        remove_placement_group(group)


def wait_for(references: list[Any], bundles: list[dict[str, float]], wait_s: float, say: Say) -> None:
    """Waits for all ``references``, telling every few seconds what is wanted and what there is."""
    deadline = time.monotonic() + wait_s
    while True:
        left = deadline - time.monotonic()
        _, waiting = ray.wait(references, num_returns=len(references), timeout=max(0.0, min(_SAY_EVERY_S, left)))
        if not waiting:
            return
        wanted = f"wants {_words(_total(bundles))}, the cluster has {_words(ray.cluster_resources())}"
        wanted += f" of which {_words(ray.available_resources())} are free"
        if time.monotonic() >= deadline:
            raise TooFewResources(f"{wanted}; gave up after {wait_s:g} s")
        say(f"waiting: {wanted}; {max(0.0, deadline - time.monotonic()):.0f} s left")


def _total(bundles: list[dict[str, float]]) -> dict[str, float]:
    kinds = {kind for bundle in bundles for kind in bundle}
    return {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in kinds}


def _words(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPU and {resources.get('GPU', 0.0):g} GPU"


def _cause(error: RayTaskError) -> str:
    cause = error.cause if isinstance(error.cause, BaseException) else error
    return f"{type(cause).__name__}: {cause}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
