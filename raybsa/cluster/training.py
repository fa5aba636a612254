"""TrainingCoordinator: a ring of Ray actors that trains one model, and everything that is decided when some are lost.

It owns the store where ranks meet, forms generations, and drives them. When a rank dies, hangs or fails, it cancels the
others (they are free in milliseconds), fills the empty ranks (warm spares first, then fresh workers, else the ring
shrinks), lets the ranks meet again, copies the state of the rank that is furthest to those behind it, and goes on with
the step that was running. Nothing below it knows of lost ranks.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raybsa.cluster.crew import TICK_S, Crew, cause_of
from raybsa.cluster.faults import Fault, FaultKind, FaultPlan, mark
from raybsa.cluster.member import MemberSettings, Progress
from raybsa.cluster.membership import Membership, Seat
from raybsa.cluster.metrics import REBUILDS
from raybsa.cluster.nodes import kill_raylet
from raybsa.cluster.resources import Say, Share
from raybsa.comm import Broken
from raybsa.events import Events
from raybsa.gradients.overlap import Overlap
from raybsa.spec import TrialSpec


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says what was tried."""


@dataclass(frozen=True)
class Recovery:
    """One recovery.

    Args:
        generation: the one that broke.
        lost: (worker, why) of each lost worker; empty where the ring grew, or broke without a loss.
        noticed_at, resumed_at: when the coordinator knew, and when all ranks could train again, of ``time.time``.
        step: the step from which they went on.
        steps_lost: applied steps that had to be made again (0 where a survivor had them all).
        filled: how the ring was filled: "spare", "fresh", "shrunk", "grown" or "as it was".
        world_size: ranks afterwards.
        filled_at, formed_at: when the workers were at hand, and when all ranks had met.
    """

    generation: int
    lost: tuple[tuple[int, str], ...]
    noticed_at: float
    resumed_at: float
    step: int
    steps_lost: int
    filled: str
    world_size: int
    filled_at: float
    formed_at: float

    @property
    def resumed_in_s(self) -> float:
        return self.resumed_at - self.noticed_at


@dataclass(frozen=True)
class TrainingResult:
    """What a training led to: the loss of every step (nats a token), its recoveries, bytes that one rank sent in one
    generation at most, by kind, a digest of the final state (equal on all ranks), bits per held-out byte, the seconds
    from the first step to the last, recoveries included, when each step was applied first (of ``time.time``), and how
    much of the gradients' travel lay within backward, over all ranks."""

    losses: dict[int, float]
    recoveries: tuple[Recovery, ...]
    sent: dict[str, int]
    digest: str
    bits_per_byte: float | None
    world_size: int
    train_seconds: float
    applied_at: dict[int, float]
    overlap: Overlap


class _Wreck(Exception):
    """The running generation broke: an event on the coordinator's own way, never seen outside."""

    def __init__(self, lost: dict[int, str]) -> None:
        super().__init__(str(lost))
        self.lost, self.noticed_at = lost, time.time()


class TrainingCoordinator:
    """Trains ``spec`` on ``world_size`` ranks; use as a context manager.

    Args:
        spec: task "byte_lm", variant "distributed".
        share: what each rank owns.
        world_size: ranks.
        spares: warm workers that wait for a loss.
        settings: what members are made with.
        heartbeat_s: a rank that does not answer for this long hangs and is lost.
        stop_s: how long a rank that does answer may take to leave a broken ring: it first ends what it computes.
        replace_s: how long a lost rank without a spare waits for a fresh worker before the ring shrinks.
        min_ranks: the fewest ranks to go on with.
        max_failures: how often a step may fail before the training has.
        wait_s: the longest wait for the workers at the start.
        plan: faults to inject: its k-th entry is armed in the k-th generation.
        tell: hears the steps applied and the last loss after each stretch.
        say: where messages go.
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
        stop_s: float = 30.0,
        replace_s: float = 10.0,
        min_ranks: int = 1,
        max_failures: int = 5,
        wait_s: float = 60.0,
        plan: FaultPlan = (),
        tell: Callable[[int, float], None] = lambda step, loss: None,
        say: Say = print,
    ) -> None:
        if world_size < 1 or spares < 0 or not 1 <= min_ranks <= world_size:
            raise ValueError(
                f"a ring needs 1 <= min_ranks <= world_size and spares >= 0, got min_ranks {min_ranks}, "
                f"world_size {world_size}, spares {spares}"
            )
        settings = replace(settings or MemberSettings(num_threads=share.num_threads), run=secrets.token_hex(8))
        self._crew = Crew(spec, settings, share, heartbeat_s, say, self._strike)
        self._marks, self._run = settings.marks, settings.labels.get("run", "")
        self._events = Events(__name__, **settings.labels)
        self._spec, self._wanted, self._num_spares, self._min_ranks = spec, world_size, spares, min_ranks
        self._stop_s, self._replace_s, self._wait_s = stop_s, replace_s, wait_s
        self._max_failures = max_failures
        self._plan, self._tell, self._say = plan, tell, say
        self._members = Membership(0, ())
        self._losses: dict[int, float] = {}
        self._applied_at: dict[int, float] = {}
        self._sent: dict[str, int] = {}
        self._overlap = Overlap()
        self._recoveries: list[Recovery] = []
        self._store: Any = None

    def __enter__(self) -> TrainingCoordinator:
        """Makes ranks and spares. Raises TooFewResources, or TrainingFailed where a worker cannot be made."""
        from torch.distributed import TCPStore

        self._store = TCPStore(_host(), 0, None, True, wait_for_workers=False)
        try:
            workers = self._crew.recruit(self._wanted + self._num_spares, self._wait_s)
        except RayError as error:
            self.close()
            raise TrainingFailed(f"a worker could not be made: {cause_of(error)}") from error
        except BaseException:
            self.close()
            raise
        self._members = Membership(1, tuple(workers[: self._wanted]))
        self._crew.spares = workers[self._wanted :]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker and the store; safe to call twice."""
        self._crew.close()
        self._store = None

    # ---- training --------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool = False, stretch: int = 50, evaluate: bool = True) -> TrainingResult:
        """Trains to ``spec.train_steps``.

        Args:
            resume: begin at the newest whole checkpoint.
            stretch: steps between two words of progress.
            evaluate: also find the bits per held-out byte.

        Raises:
            TrainingFailed: too few ranks are left, a step fails again and again, or a rank refuses its arguments.
        """
        step, failures, furthest, begin = None, 0, 0, time.perf_counter()
        while True:
            try:
                if step is None:
                    steps = self._form()
                    step = self._level(self._restore(steps, any_run=True) if resume else steps)
                while step < self._spec.train_steps:
                    step = self._train(min(self._spec.train_steps, (step // stretch + 1) * stretch))
                return self._result(evaluate, time.perf_counter() - begin)
            except _Wreck as wreck:
                step = self._recover(wreck, resume)
                reached = max(step, max(self._losses, default=-1) + 1)
                if self._recoveries[-1].filled != "grown":
                    failures = 1 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                if failures > self._max_failures:
                    raise TrainingFailed(f"step {reached} failed {failures} times, last with {wreck.lost}") from wreck

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """Those so far."""
        return tuple(self._recoveries)

    def weights(self) -> list[Any]:
        """Rank 0's parameters, on the CPU: for tests and small models."""
        return self._ask_all("weights")[0]

    def _train(self, until: int) -> int:
        """One stretch; returns the step reached."""
        for progress in self._ask_all("train", until, watch=True):
            self._take(progress)
        self._tell(until, self._losses.get(until - 1, float("nan")))
        return until

    def _result(self, evaluate: bool, seconds: float) -> TrainingResult:
        bits = self._ask_all("evaluate")[0] if evaluate else None
        digests = set(self._ask_all("digest"))
        if len(digests) > 1:
            raise TrainingFailed(f"the ranks ended with different weights: {sorted(digests)}")
        losses, size = dict(sorted(self._losses.items())), self._members.world_size
        at = dict(sorted(self._applied_at.items()))
        sent, digest = dict(self._sent), digests.pop()
        return TrainingResult(losses, self.recoveries, sent, digest, bits, size, seconds, at, self._overlap)

    def _take_if_progress(self, result: Any) -> None:
        if isinstance(result, Progress):
            self._take(result)

    def _take(self, progress: Progress) -> None:
        self._losses |= dict(progress.losses)
        self._overlap += progress.overlap
        for step, at in progress.applied_at:
            self._applied_at.setdefault(step, at)
        for kind, nbytes in progress.sent.items():
            self._sent[kind] = max(self._sent.get(kind, 0), nbytes)

    # ---- forming a ring --------------------------------------------------------------------------------------------

    def _form(self) -> list[int]:
        """All ranks of the present membership meet; returns the steps that each has applied, in rank order."""
        members = self._members
        armed = self._plan[members.generation - 1] if members.generation <= len(self._plan) else ()
        seats = [
            Seat(members.generation, rank, members.world_size, _host(), self._store.port)
            for rank in range(members.world_size)
        ]
        stand = self._gather(
            {w: self._crew.call(w, "join", seat, armed) for w, seat in zip(members.workers, seats, strict=True)}
        )
        for progress in stand:
            self._take(progress)
        self._events.tell("formed", generation=members.generation, world_size=members.world_size)
        return [progress.step for progress in stand]

    def _restore(self, steps: Sequence[int], *, any_run: bool) -> list[int]:
        """Rank 0 of the ring that was formed takes the newest checkpoint; returns the steps of all ranks. A run that
        was not to resume leaves alone what an earlier one wrote to the same folder."""
        first = self._members.workers[0]
        restored = self._gather({first: self._crew.call(first, "restore", any_run)})[0]
        none = "no checkpoint of this question was found: the training begins at step 0"
        self._say(f"resumed from the checkpoint of step {restored}" if restored else none)
        return [restored, *steps[1:]]

    def _level(self, steps: Sequence[int]) -> int:
        """Copies the state of the rank that is furthest to those behind it; returns its step."""
        furthest = max(steps)
        needy = [rank for rank, step in enumerate(steps) if step < furthest]
        if needy:
            self._ask_all("level", steps.index(furthest), needy)
        return furthest

    # ---- calls and their failures ------------------------------------------------------------------------------------

    def _ask_all(self, method: str, *arguments: Any, watch: bool = False) -> list[Any]:
        """The method's result on every rank, in rank order. ``watch``: a worker that arrives meanwhile ends it."""
        return self._gather({w: self._crew.call(w, method, *arguments) for w in self._members.workers}, watch=watch)

    def _gather(self, references: dict[int, Any], *, watch: bool = False) -> list[Any]:
        """Waits for all and watches their pulse; at the first trouble raises ``_Wreck`` with all who are lost."""
        waiting, results = dict(references), {}
        while waiting:
            ready, _ = ray.wait(list(waiting.values()), num_returns=1, timeout=TICK_S)
            for worker in [w for w, reference in waiting.items() if reference in ready]:
                try:
                    results[worker] = ray.get(waiting.pop(worker))
                except RayError as error:
                    _check_question(error)
                    raise self._wreck(_blame(worker, error), waiting, results.values()) from error
            lost = self._crew.silent(waiting)
            if watch:
                self._mind_spares()
            if lost or (watch and self._may_grow()):
                raise self._wreck(lost, waiting, results.values())
        return [results[worker] for worker in references]

    def _wreck(self, lost: dict[int, str], waiting: dict[int, Any], results: Iterable[Any] = ()) -> _Wreck:
        """Cancels the others and waits until each is free or known to be lost; what ``results`` told is not forgotten.
        A rank that is alive may first have to end what it computes."""
        wreck = _Wreck(lost)
        for result in results:
            self._take_if_progress(result)
        others = [worker for worker in self._members.workers if worker not in lost]
        cancels = self._crew.cancel(others, self._members.generation, "the ring broke")
        wanted = [(w, reference) for w, reference in (*cancels.items(), *waiting.items()) if w not in lost]
        deadline = time.monotonic() + self._stop_s
        while wanted:
            ready, _ = ray.wait([reference for _, reference in wanted], num_returns=1, timeout=TICK_S)
            for worker, reference in [each for each in wanted if each[1] in ready]:
                try:
                    self._take_if_progress(ray.get(reference))
                except RayError as error:
                    wreck.lost |= _blame(worker, error)
            wanted = [each for each in wanted if each[1] not in ready and each[0] not in wreck.lost]
            wreck.lost |= self._crew.silent({worker for worker, _ in wanted})
            if time.monotonic() > deadline:
                wreck.lost |= {worker: f"did not stop within {self._stop_s:g} s" for worker, _ in wanted}
            wanted = [each for each in wanted if each[0] not in wreck.lost]
        return wreck

    # ---- recovery --------------------------------------------------------------------------------------------------

    def _recover(self, wreck: _Wreck, resume: bool) -> int:
        """Brings the ring back; returns the step it goes on from."""
        broken, noticed_at, lost = self._members.generation, wreck.noticed_at, dict(wreck.lost)
        reached = max(self._losses, default=-1) + 1
        for _ in range(max(1, self._max_failures)):
            filled, filled_at = self._next_membership(wreck), time.time()
            try:
                steps = self._form()
                formed_at = time.time()
                if not max(steps) and (reached or resume):
                    steps = self._restore(steps, any_run=resume)  # no survivor has a state: it comes from a checkpoint
                step = self._level(steps)
                break
            except _Wreck as again:
                lost |= again.lost
                wreck = again
        else:
            raise TrainingFailed(f"the ring could not be formed again, {len(lost)} workers were lost: {lost}")
        size = self._members.world_size
        recovery = Recovery(
            generation=broken,
            lost=tuple(sorted(lost.items())),
            noticed_at=noticed_at,
            resumed_at=time.time(),
            step=step,
            steps_lost=max(0, reached - step),
            filled=filled,
            world_size=size,
            filled_at=filled_at,
            formed_at=formed_at,
        )
        self._recoveries.append(recovery)
        REBUILDS.inc(1, {"run": self._run, "filled": filled})
        reasons = "; ".join(f"worker {worker}: {why}" for worker, why in recovery.lost) or filled
        self._say(
            f"generation {self._members.generation} of {size} ranks goes on at step {step} after "
            f"{recovery.resumed_in_s:.2f} s ({reasons})"
        )
        self._events.tell(
            "recovered",
            generation=self._members.generation,
            step=step,
            steps_lost=recovery.steps_lost,
            seconds=recovery.resumed_in_s,
            filled=filled,
            world_size=size,
            lost=reasons,
        )
        return step

    def _next_membership(self, wreck: _Wreck) -> str:
        """Fills the empty ranks; says how."""
        for worker in wreck.lost:
            self._crew.lose(worker)
        missing = sum(worker in wreck.lost for worker in self._members.workers)
        if missing:
            spares = set(self._crew.spares)
            fresh = self._crew.stand_ins(missing, self._replace_s)
            filled = "shrunk" if len(fresh) < missing else "spare" if spares >= set(fresh) else "fresh"
            self._members = self._members.after_loss(wreck.lost, fresh)
        else:
            fresh = self._crew.take_arrived(self._wanted - self._members.world_size)
            filled = "grown" if fresh else "as it was"
            self._members = self._members.grown(fresh)
        size = self._members.world_size
        if size < self._min_ranks:
            raise TrainingFailed(f"{size} ranks are left, at least {self._min_ranks} are wanted: {wreck.lost}")
        self._crew.order(self._missing())
        return filled

    def _mind_spares(self) -> None:
        """A spare that died makes way for a fresh one before it is needed."""
        lost = self._crew.silent(self._crew.spares)
        for spare, why in lost.items():
            self._say(f"spare {spare} is lost: {why}")
            self._crew.spares.remove(spare)
            self._crew.lose(spare)
        if lost:
            self._crew.order(self._missing())

    def _missing(self) -> int:
        """Workers that are to be on their way."""
        return self._wanted - self._members.world_size + self._num_spares - len(self._crew.spares)

    def _strike(self, worker: int, fault: Fault) -> None:
        """A drill's fault that is done from outside."""
        members = self._members
        mark(self._marks, fault)
        if fault.kind is FaultKind.DRIVER:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind is FaultKind.LOST_NODE:
            kill_raylet(self._crew.node(worker))
        elif fault.kind is FaultKind.TWO_RANKS:
            self._crew.kill(members.workers[(members.rank(worker) + 1) % members.world_size])
        elif fault.kind is FaultKind.SPARE and self._crew.spares:
            self._crew.kill(self._crew.spares[0])
        if fault.kind is not FaultKind.LOST_NODE:
            self._crew.kill(worker)

    def _may_grow(self) -> bool:
        """Whether a worker has arrived for an empty rank. Those that the ring does not need become spares."""
        if not self._crew.arriving or not self._crew.has_arrived():
            return False
        if self._members.world_size < self._wanted:
            return True
        self._crew.spares += self._crew.take_arrived(self._num_spares - len(self._crew.spares))
        return False


def _check_question(error: RayError) -> None:
    """Arguments that a worker refuses will be refused by any other too."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, (ValueError, TypeError)):
        raise TrainingFailed(f"a rank refused what it was asked for: {cause_of(error)}") from error


def _blame(worker: int, error: RayError) -> dict[int, str]:
    """The worker is lost unless it only lost its peers."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return {} if isinstance(cause, Broken) else {worker: cause_of(error)}


def _host() -> str:
    return ray.util.get_node_ip_address()
