"""Coordinator: independent workers as Ray actors, and the one place that decides what a failure means.

A worker that dies takes its trial to a fresh worker, a bounded number of times; a trial that raises is the trial's own
failure and is not tried again. Waits for resources are bounded and say what is missing. Actors are never detached:
they end with the coordinator, with the process that made it, and with ``ray job stop``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raybsa.cluster.causes import whose
from raybsa.cluster.resources import Say, Share, TooFewResources, await_workers
from raybsa.cluster.versions import require, versions
from raybsa.results.record import MACHINE, Measurement, Outcome
from raybsa.spec import TrialSpec

MakeWorker = Callable[[str, dict[str, Any]], Any]


class WorkerNotMade(RuntimeError):
    """A worker could not be made: its constructor raised or its process died; the message says why."""


@dataclass(frozen=True)
class _Flight:
    """A trial under way on the worker of a slot."""

    reference: Any
    slot: int
    spec: TrialSpec
    failures: int
    deadline: float


def make_worker(device: str, arguments: dict[str, Any]) -> Any:
    """A Worker in the process that will run it: only there is torch imported."""
    from raybsa.cluster.worker import Worker

    return Worker(device, **arguments)


class _Host:
    """The actor: holds one worker and passes calls through."""

    def __init__(self, wanted: dict[str, str], make: MakeWorker, device: str, arguments: dict[str, Any]) -> None:
        require(wanted)
        self._worker = make(device, arguments)

    def describe(self) -> str:
        return self._worker.describe()

    def run(self, spec: TrialSpec, until: int | None) -> Measurement:
        return self._worker.run(spec) if until is None else self._worker.run(spec, until)


class Coordinator:
    """Runs trials on ``num_workers`` warm workers, made on entering (``with``) or when first needed.

    Args:
        share: what each worker owns.
        num_workers: how many trials run at once.
        retries: how many times a trial whose worker died is given to a fresh one.
        wait_s: the longest wait for a worker to come up.
        trial_s: the longest that one attempt at a trial may take; its worker is then killed and the trial has failed.
        timing: arguments of the workers (``repeats``, ``budget_s``).
        make: makes the worker inside its actor: ``make(device, arguments)`` has ``describe()`` and ``run(spec)``.
        group: a placement group with one bundle a worker; None lets Ray place them.
        say: where messages go.
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
        say: Say = print,
    ) -> None:
        self._share, self._slots, self._group = share, range(num_workers), group
        self._retries, self._wait_s, self._trial_s, self._say = retries, wait_s, trial_s, say
        self._make, self._arguments = make, {"num_threads": share.num_threads, **(timing or {})}
        self._actors: dict[int, Any] = {}

    def __enter__(self) -> Coordinator:
        """Makes all workers. Raises TooFewResources or WorkerNotMade when one does not come up."""
        self._start(self._slots)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills every worker; safe to call twice."""
        for slot in list(self._actors):
            self._kill(slot)

    def run(self, spec: TrialSpec, until: int | None = None) -> Outcome:
        """One trial, to its end or ``until`` so many training steps; a worker that still has it goes on from there."""
        (outcome,) = self.map([spec], until)
        return outcome

    def map(self, specs: Iterable[TrialSpec], until: int | None = None) -> Iterator[Outcome]:
        """Each trial's outcome as it comes, at most ``num_workers`` under way. Specs are drawn as workers come free."""
        fresh = ((spec, 0) for spec in specs)
        again: deque[tuple[TrialSpec, int]] = deque()
        idle, flights = list(self._slots), dict[Any, _Flight]()
        try:
            while True:
                while idle and (question := again.popleft() if again else next(fresh, None)):
                    launched = self._launch(idle[-1], *question, until)
                    if isinstance(launched, Outcome):
                        yield launched
                        continue
                    flights[launched.reference] = launched
                    idle.pop()
                if not flights:
                    return
                flight = flights.pop(_first_over(flights))
                outcome = self._land(flight)
                idle.append(flight.slot)
                if outcome is None:
                    again.append((flight.spec, flight.failures + 1))
                else:
                    yield outcome
        finally:
            for flight in flights.values():
                self._kill(flight.slot)

    # ---- trials ------------------------------------------------------------------------------------------------

    def _launch(self, slot: int, spec: TrialSpec, failures: int, until: int | None) -> _Flight | Outcome:
        """The trial under way; its outcome already where no worker can be had."""
        if slot not in self._actors:
            try:
                self._start([slot])
            except (TooFewResources, WorkerNotMade) as error:
                return Outcome(spec, None, f"{type(error).__name__}: {error}", failures, cause=MACHINE)
        reference = self._actors[slot].run.remote(spec, until)
        return _Flight(reference, slot, spec, failures, time.monotonic() + self._trial_s)

    def _land(self, flight: _Flight) -> Outcome | None:
        """The trial's outcome; None where it should go to a fresh worker."""
        spec, failures = flight.spec, flight.failures
        try:
            return Outcome(spec, ray.get(flight.reference, timeout=0), None, failures)
        except GetTimeoutError:
            self._kill(flight.slot)
            return Outcome(spec, None, f"took longer than {self._trial_s:g} s", failures, cause=MACHINE)
        except RayTaskError as error:
            if self._share.num_gpus:
                self._kill(flight.slot)  # a CUDA error may have left the process unusable
            return Outcome(spec, None, _cause(error), failures, cause=whose(error))
        except RayError as error:  # whatever else Ray reports took the worker: its death, its node, its memory
            self._kill(flight.slot)
            if failures < self._retries:
                self._say(f"a worker died, its trial goes to a fresh one (attempt {failures + 2})")
                return None
            died = f"its worker died {failures + 1} times: {_first_line(error)}"
            return Outcome(spec, None, died, failures + 1, cause=whose(error))

    # ---- workers -----------------------------------------------------------------------------------------------

    def _start(self, slots: Iterable[int]) -> None:
        """Makes the workers of ``slots`` and waits until all are up; where one does not come, none stays."""
        actors = {slot: self._actor(slot) for slot in slots}
        self._actors |= actors
        try:
            signs = [actor.describe.remote() for actor in actors.values()]
            await_workers(signs, self._share, self._wait_s, self._say)
            ray.get(signs)
        except BaseException as error:
            for slot in actors:
                self._kill(slot)
            if isinstance(error, RayError):
                raise WorkerNotMade(f"a worker on {self._share} could not be made: {last_line(error)}") from error
            raise

    def _actor(self, slot: int) -> Any:
        options: dict[str, Any] = {"num_cpus": self._share.num_cpus, "num_gpus": self._share.num_gpus}
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=slot
            )
        host: Any = ray.remote(_Host)
        return host.options(**options).remote(versions(), self._make, self._share.device, self._arguments)

    def _kill(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        if actor is not None and ray.is_initialized():
            ray.kill(actor)


def _first_over(flights: dict[Any, _Flight]) -> Any:
    """The reference of the first trial that is over, or whose time is."""
    soonest = min(flights.values(), key=lambda flight: flight.deadline)
    ready, _ = ray.wait(list(flights), num_returns=1, timeout=max(0.0, soonest.deadline - time.monotonic()))
    return ready[0] if ready else soonest.reference


def _cause(error: RayTaskError) -> str:
    cause = error.cause if isinstance(error.cause, BaseException) else error
    return f"{type(cause).__name__}: {cause}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """What Ray's long texts end with: the error that is behind them."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
