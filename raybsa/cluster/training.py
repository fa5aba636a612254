"""TrainingCoordinator: a ring of Ray actors that trains one model, and everything that is decided when some are lost.

It owns the store where ranks meet, forms generations, and drives them. When a rank dies, hangs or fails, it cancels the
others (they are free in milliseconds), fills the empty ranks (warm spares first, then fresh workers, else the ring
shrinks), lets the ranks meet again, copies the state of the rank that is furthest to those behind it, and goes on with
the step that was running. Nothing below it knows of lost ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raybsa.cluster.faults import Fault, FaultPlan
from raybsa.cluster.member import Member, MemberSettings, Progress, Status
from raybsa.cluster.membership import Membership, Seat
from raybsa.cluster.resources import Say, Share, wait_for
from raybsa.comm import Broken
from raybsa.spec import TrialSpec

TICK_S = 0.02
MAX_FAILURES_AT_A_STEP = 5


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says what was tried."""


@dataclass(frozen=True)
class Recovery:
    """One recovery, in seconds of ``time.time``.

    Args:
        generation: the one that broke.
        lost: (worker, why) of each lost worker; empty where the ring grew or broke without a loss.
        noticed_at, resumed_at: when the coordinator knew, and when all ranks trained again.
        step: the step from which they went on.
        steps_lost: applied steps that had to be made again (0 where a survivor had them all).
        filled: how the ring was filled: "spare", "fresh", "shrunk", "grown" or "as it was".
        world_size: ranks afterwards.
    """

    generation: int
    lost: tuple[tuple[int, str], ...]
    noticed_at: float
    resumed_at: float
    step: int
    steps_lost: int
    filled: str
    world_size: int

    @property
    def resumed_in_s(self) -> float:
        return self.resumed_at - self.noticed_at


@dataclass
class TrainingResult:
    """What a training led to: the loss of every step (nats a token), its recoveries, bytes that one rank sent in one
    generation at most, by kind, a digest of the final state (equal on all ranks), and bits per held-out byte."""

    losses: dict[int, float]
    recoveries: list[Recovery]
    sent: dict[str, int]
    digest: str
    bits_per_byte: float | None
    world_size: int


@dataclass
class _Worker:
    """An actor and what was last heard of it."""

    number: int
    actor: Any
    made: Any
    pid: int | None = None
    ping: Any = None
    heard_at: float = field(default_factory=time.monotonic)
    asks: Fault | None = None


class _Wreck(Exception):
    """The running generation broke."""

    def __init__(self, lost: dict[int, str]) -> None:
        super().__init__(str(lost))
        self.lost, self.noticed_at = lost, time.time()


class MemberActor:
    """The actor: a member, its control methods in a thread group of their own."""

    def __init__(self, spec: TrialSpec, device: str, settings: MemberSettings) -> None:
        self._member = Member(spec, device, settings)

    @ray.method(concurrency_group="control")
    def status(self) -> Status:
        return self._member.status()

    @ray.method(concurrency_group="control")
    def cancel(self, generation: int, reason: str) -> None:
        self._member.cancel(generation, reason)

    def call(self, method: str, *arguments: Any) -> Any:
        """Any other method of the member, one after the other."""
        return getattr(self._member, method)(*arguments)


class TrainingCoordinator:
    """Trains ``spec`` on ``world_size`` ranks; use as a context manager.

    Args:
        spec: task "byte_lm", variant "distributed".
        share: what each rank owns.
        world_size: ranks.
        spares: warm workers that wait for a loss.
        settings: what members are made with.
        heartbeat_s: a rank that does not answer for this long hangs and is lost.
        replace_s: how long a lost rank without a spare waits for a fresh worker before the ring shrinks.
        min_ranks: the fewest ranks to go on with.
        wait_s: the longest wait for the workers at the start.
        plan: faults to inject: its k-th entry is armed in the k-th generation.
        tell: hears the step and its loss after each stretch.
        say: where messages go.
        strike: does to an actor what a fault asks for from outside.
    """

    def __init__(
        self,
        spec: TrialSpec,
        share: Share,
        *,
        world_size: int,
        spares: int = 0,
        settings: MemberSettings | None = None,
        heartbeat_s: float = 2.0,
        replace_s: float = 10.0,
        min_ranks: int = 1,
        wait_s: float = 60.0,
        plan: FaultPlan = (),
        tell: Callable[[int, float], None] = lambda step, loss: None,
        say: Say = print,
        strike: Callable[[Any, Fault], None] | None = None,
    ) -> None:
        if world_size < 1 or spares < 0 or not 1 <= min_ranks <= world_size:
            raise ValueError(
                f"a ring needs 1 <= min_ranks <= world_size and spares >= 0, got min_ranks {min_ranks}, "
                f"world_size {world_size}, spares {spares}"
            )
        self._spec, self._share, self._wanted, self._num_spares = spec, share, world_size, spares
        self._settings = settings or MemberSettings(num_threads=share.num_cpus)
        self._heartbeat_s, self._replace_s, self._min_ranks, self._wait_s = heartbeat_s, replace_s, min_ranks, wait_s
        self._plan, self._tell, self._say = plan, tell, say
        self._strike = strike or (lambda actor, fault: ray.kill(actor))
        self._numbers = count()
        self._workers: dict[int, _Worker] = {}
        self._spares: list[int] = []
        self._arriving: list[int] = []
        self._members = Membership(0, ())
        self._losses: dict[int, float] = {}
        self._sent: dict[str, int] = {}
        self._recoveries: list[Recovery] = []
        self._store: Any = None

    # ---- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> TrainingCoordinator:
        """Makes ranks and spares. Raises TooFewResources, or TrainingFailed where a worker cannot be made."""
        from torch.distributed import TCPStore

        self._store = TCPStore(_host(), 0, None, True, wait_for_workers=False)
        try:
            fresh = [self._make() for _ in range(self._wanted + self._num_spares)]
            made = [self._workers[number].made for number in fresh]
            wait_for(made, self._share, len(made), self._wait_s, self._say)
            for number in fresh:
                self._arrived(number)
        except RayError as error:
            self.close()
            raise TrainingFailed(f"a worker could not be made: {_cause(error)}") from error
        except BaseException:
            self.close()
            raise
        self._spares = fresh[self._wanted :]
        self._members = Membership(1, tuple(fresh[: self._wanted]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills every worker and ends the store; safe to call twice."""
        for number in list(self._workers):
            self._lose(number)
        self._store = None

    # ---- training --------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool = False, stretch: int = 50, evaluate: bool = True) -> TrainingResult:
        """Trains to ``spec.train_steps``.

        Args:
            resume: begin at the newest whole checkpoint.
            stretch: steps between two words of progress.
            evaluate: also find the bits per held-out byte.

        Raises:
            TrainingFailed: too few ranks are left, or a step fails again and again.
        """
        step, failures = self._begin(resume), 0
        while True:
            try:
                while step < self._spec.train_steps:
                    until = min(self._spec.train_steps, (step // stretch + 1) * stretch)
                    step, failures = self._train(until), 0
                bits = self._ask_all("evaluate")[0] if evaluate else None
                digests = set(self._ask_all("weights_digest"))
                if len(digests) > 1:
                    raise TrainingFailed(f"the ranks ended with different weights: {sorted(digests)}")
                return TrainingResult(
                    dict(sorted(self._losses.items())),
                    self._recoveries,
                    self._sent,
                    digests.pop(),
                    bits,
                    self._members.world_size,
                )
            except _Wreck as wreck:
                failures += 1
                if failures > MAX_FAILURES_AT_A_STEP:
                    raise TrainingFailed(
                        f"step {step} failed {failures} times, last with {wreck.lost or 'a broken ring'}"
                    ) from wreck
                recovered = self._recover(wreck)
                failures = failures if recovered == step else 0
                step = recovered

    def weights(self) -> list[Any]:
        """Rank 0's parameters, on the CPU: for tests and small models."""
        return self._ask(self._members.workers[0], "weights")

    def _begin(self, resume: bool) -> int:
        """Forms the first generation; returns the step it stands at."""
        while True:
            try:
                steps = self._form()
                if resume:
                    steps = self._restore()
                return self._level(steps)
            except _Wreck as wreck:
                if wreck.lost and set(wreck.lost) >= set(self._members.workers):
                    raise TrainingFailed(f"every rank was lost at the start: {wreck.lost}") from wreck
                self._replace(wreck)

    def _train(self, until: int) -> int:
        """One stretch; returns the step reached."""
        for progress in self._ask_all("train", until, watch=True):
            self._take(progress)
        last = max(self._losses, default=0)
        self._tell(until, self._losses.get(last, float("nan")))
        return until

    def _take(self, progress: Progress) -> None:
        self._losses |= dict(progress.losses)
        for kind, nbytes in progress.sent.items():
            self._sent[kind] = max(self._sent.get(kind, 0), nbytes)

    def _form(self) -> list[int]:
        """All ranks of the present membership meet; returns the steps that each has applied, in rank order."""
        members = self._members
        armed = self._plan[members.generation - 1] if members.generation <= len(self._plan) else ()
        references = {
            worker: self._workers[worker].actor.call.remote(
                "join", Seat(members.generation, rank, members.world_size, _host(), self._store.port), armed
            )
            for rank, worker in enumerate(members.workers)
        }
        return self._gather(references)

    def _level(self, steps: Sequence[int]) -> int:
        """Copies the state of the rank that is furthest to those behind it; returns its step."""
        furthest = max(steps)
        needy = [rank for rank, step in enumerate(steps) if step < furthest]
        if needy:
            self._ask_all("level", steps.index(furthest), needy)
        return furthest

    def _restore(self) -> list[int]:
        """Rank 0 takes the newest checkpoint; returns the steps of all ranks."""
        step = self._ask(self._members.workers[0], "restore")
        if step:
            self._say(f"resumed from the checkpoint of step {step}")
        return [step] + [0] * (self._members.world_size - 1)

    # ---- calls and their failures ------------------------------------------------------------------------------------

    def _ask(self, worker: int, method: str, *arguments: Any) -> Any:
        return self._gather({worker: self._workers[worker].actor.call.remote(method, *arguments)})[0]

    def _ask_all(self, method: str, *arguments: Any, watch: bool = False) -> list[Any]:
        """The method's result on every rank, in rank order. ``watch``: a worker that arrives meanwhile ends it."""
        references = {
            worker: self._workers[worker].actor.call.remote(method, *arguments) for worker in self._members.workers
        }
        return self._gather(references, watch=watch)

    def _gather(self, references: dict[int, Any], *, watch: bool = False) -> list[Any]:
        """Waits for all, watching their pulse; the first sign of trouble raises ``_Wreck`` with all who are lost."""
        waiting = dict(references)
        for worker in waiting:
            self._workers[worker].heard_at = time.monotonic()
        results: dict[int, Any] = {}
        trouble: dict[int, str] | None = None
        while waiting and trouble is None:
            ready, _ = ray.wait(list(waiting.values()), num_returns=1, timeout=TICK_S)
            for worker in [w for w, reference in waiting.items() if reference in ready]:
                try:
                    results[worker] = ray.get(waiting.pop(worker))
                except RayError as error:
                    trouble = _blame(worker, error)
            trouble = self._pulse(waiting) or trouble if trouble is None else trouble
            if trouble is None and watch and self._grow():
                trouble = {}
        if trouble is not None:
            raise self._wreck(trouble, waiting)
        return [results[worker] for worker in references]

    def _pulse(self, waiting: Collection[int]) -> dict[int, str] | None:
        """Pings those that are waited for; returns who has been silent for too long, or died."""
        now, lost = time.monotonic(), {}
        for number in waiting:
            worker = self._workers[number]
            if worker.ping is not None and ray.wait([worker.ping], timeout=0)[0]:
                try:
                    status: Status = ray.get(worker.ping)
                except RayError as error:
                    lost[number] = _cause(error)
                    continue
                worker.ping, worker.heard_at, worker.pid = None, now, status.pid
                if status.asks is not None and worker.asks is None:
                    worker.asks = status.asks
                    self._strike(worker.actor, status.asks)
            if worker.ping is None and now - worker.heard_at > self._heartbeat_s / 8:
                worker.ping = worker.actor.status.remote()
            if now - worker.heard_at > self._heartbeat_s:
                lost[number] = f"no sign of life for {self._heartbeat_s:g} s"
        return lost or None

    def _wreck(self, lost: dict[int, str], waiting: dict[int, Any]) -> _Wreck:
        """Cancels the others and waits until each is free or known to be lost."""
        wreck = _Wreck(dict(lost))
        generation = self._members.generation
        others = [worker for worker in self._members.workers if worker not in wreck.lost]
        cancels = {w: self._workers[w].actor.cancel.remote(generation, "the ring broke") for w in others}
        for worker, reference in cancels.items():
            self._outcome(wreck, worker, reference)
        for worker, reference in waiting.items():
            if worker not in wreck.lost:
                self._outcome(wreck, worker, reference)
        return wreck

    def _outcome(self, wreck: _Wreck, worker: int, reference: Any) -> None:
        """Waits for a call on a rank that was told to stop; a rank that fails or hangs then is lost too."""
        try:
            result = ray.get(reference, timeout=self._heartbeat_s)
            if isinstance(result, Progress):
                self._take(result)
        except GetTimeoutError:
            wreck.lost[worker] = f"did not stop within {self._heartbeat_s:g} s"
        except RayError as error:
            wreck.lost |= _blame(worker, error)

    # ---- recovery --------------------------------------------------------------------------------------------------

    def _recover(self, wreck: _Wreck) -> int:
        """Brings the ring back; returns the step it goes on from."""
        broken, lost = self._members.generation, dict(wreck.lost)
        reached = max(self._losses, default=-1) + 1
        for _ in range(MAX_FAILURES_AT_A_STEP):
            filled = self._replace(wreck)
            try:
                step = self._level(self._form_or_restore())
                break
            except _Wreck as again:
                lost |= again.lost
                wreck = again
        else:
            raise TrainingFailed(f"the ring could not be formed again, {len(lost)} workers were lost: {lost}")
        self._recoveries.append(
            Recovery(
                broken,
                tuple(sorted(lost.items())),
                wreck.noticed_at,
                time.time(),
                step,
                max(0, reached - step),
                filled,
                self._members.world_size,
            )
        )
        reasons = "; ".join(f"worker {worker}: {why}" for worker, why in lost.items()) or filled
        self._say(
            f"generation {self._members.generation} of {self._members.world_size} ranks goes on at step {step} after "
            f"{self._recoveries[-1].resumed_in_s:.2f} s ({reasons})"
        )
        return step

    def _form_or_restore(self) -> list[int]:
        """Where steps were applied and no survivor has them, the newest checkpoint is the state."""
        steps = self._form()
        return steps if max(steps) or not self._losses else self._restore()

    def _replace(self, wreck: _Wreck) -> str:
        """The next membership; says how it was filled."""
        for worker in wreck.lost:
            self._lose(worker)
        missing = sum(worker in wreck.lost for worker in self._members.workers)
        fresh, filled = self._stand_ins(missing)
        arrived = [worker for worker in self._arriving if self._has_arrived(worker)] if not missing else []
        if missing:
            self._members = self._members.after_loss(wreck.lost, fresh)
        else:
            self._arriving = [worker for worker in self._arriving if worker not in arrived]
            self._members = self._members.grown(arrived)
            filled = "grown" if arrived else "as it was"
        if self._members.world_size < self._min_ranks:
            raise TrainingFailed(
                f"{self._members.world_size} ranks are left, at least {self._min_ranks} are wanted: {wreck.lost}"
            )
        self._order_workers()
        return filled

    def _stand_ins(self, missing: int) -> tuple[list[int], str]:
        """Workers for the empty ranks: living spares, then fresh ones that come up in time."""
        fresh: list[int] = []
        while self._spares and len(fresh) < missing:
            spare = self._spares.pop(0)
            if self._is_alive(spare):
                fresh.append(spare)
            else:
                self._lose(spare)
        if len(fresh) == missing:
            return fresh, "spare"
        while len(self._arriving) < missing - len(fresh):
            self._arriving.append(self._make())
        deadline = time.monotonic() + self._replace_s
        while len(fresh) < missing and self._arriving and time.monotonic() < deadline:
            ray.wait([self._workers[n].made for n in self._arriving], num_returns=1, timeout=TICK_S)
            for number in [n for n in self._arriving if self._has_arrived(n)][: missing - len(fresh)]:
                self._arriving.remove(number)
                fresh.append(number)
        return fresh, "fresh" if len(fresh) == missing else "shrunk"

    def _order_workers(self) -> None:
        """Asks for the ranks and spares that are missing; they arrive while training goes on."""
        wanted = self._wanted - self._members.world_size + self._num_spares - len(self._spares)
        while len(self._arriving) < wanted:
            self._arriving.append(self._make())

    def _grow(self) -> bool:
        """Whether a worker has arrived for an empty rank. Those that the ring does not need become spares."""
        for number in [n for n in self._arriving if self._has_arrived(n)]:
            if self._members.world_size >= self._wanted:
                self._arriving.remove(number)
                self._spares.append(number)
            else:
                return True
        return False

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _make(self) -> int:
        number = next(self._numbers)
        remote: Any = ray.remote(concurrency_groups={"control": 2})  # type: ignore[call-overload]
        actor_class = remote(MemberActor)
        actor = actor_class.options(num_cpus=self._share.num_cpus, num_gpus=self._share.num_gpus).remote(
            self._spec, self._share.device, self._settings
        )
        self._workers[number] = _Worker(number, actor, actor.status.remote())
        return number

    def _has_arrived(self, number: int) -> bool:
        """Whether a worker that was asked for is up; one that could not be made is asked for no more."""
        if not ray.wait([self._workers[number].made], timeout=0)[0]:
            return False
        try:
            self._arrived(number)
        except RayError as error:
            self._say(f"a fresh worker could not be made: {_cause(error)}")
            self._lose(number)
            self._arriving.remove(number)
            return False
        return True

    def _arrived(self, number: int) -> None:
        worker = self._workers[number]
        worker.pid = ray.get(worker.made).pid

    def _is_alive(self, number: int) -> bool:
        try:
            ray.get(self._workers[number].actor.status.remote(), timeout=self._heartbeat_s)
        except RayError:
            return False
        return True

    def _lose(self, number: int) -> None:
        """Ends a worker's process, also a stopped one on this machine, which Ray alone would take seconds to end."""
        worker = self._workers.pop(number, None)
        if worker is None or not ray.is_initialized():
            return
        ray.kill(worker.actor)
        if worker.pid is not None and _is_ours(worker.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(worker.pid, signal.SIGKILL)


def _blame(worker: int, error: RayError) -> dict[int, str]:
    """The worker is lost unless it only lost its peers."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return {} if isinstance(cause, Broken) else {worker: _cause(error)}


def _cause(error: RayError) -> str:
    cause = getattr(error, "cause", None)
    text = f"{type(cause).__name__}: {cause}" if isinstance(cause, BaseException) else str(error)
    return f"{type(error).__name__}: " * (cause is None) + next(iter(text.strip().splitlines()), "")


def _is_ours(pid: int) -> bool:
    """Whether the process is a Ray worker on this machine: pids of other machines mean nothing here."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().startswith(b"ray::MemberActor")
    except OSError:
        return False


def _host() -> str:
    return ray.util.get_node_ip_address()
