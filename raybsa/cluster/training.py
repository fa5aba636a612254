"""TrainingCoordinator: a ring of Ray actors that trains one model, and everything that is decided when some are lost.

It owns the store where ranks meet, forms generations, and drives them. When a rank dies, hangs or fails, it cancels the
others (they are free in milliseconds), fills the empty ranks (warm spares first, then fresh workers, else the ring
shrinks), lets the ranks meet again, copies the state of the rank that is furthest to those behind it, and goes on with
the step that was running. It alone decides: ``Calls`` tells it who is lost, ``Roster`` gives their ranks to others, and
what is below these knows of no lost ranks.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from raybsa.cluster.calls import Calls, Wreck
from raybsa.cluster.crew import Crew, cause_of
from raybsa.cluster.faults import Fault, FaultPlan
from raybsa.cluster.journal import Journal, Recovery, TrainingFailed, TrainingResult
from raybsa.cluster.member import MemberSettings
from raybsa.cluster.membership import Seat
from raybsa.cluster.metrics import REBUILDS
from raybsa.cluster.resources import Say, Share
from raybsa.cluster.roster import Roster
from raybsa.cluster.strike import strike
from raybsa.events import Events
from raybsa.spec import TrialSpec


def require_ring(world_size: int, *, spares: int = 0, min_ranks: int = 1, heartbeat_s: float = 2.0) -> None:
    """Raises ValueError for a ring that is none; who has yet to start Ray asks first."""
    if world_size < 1 or spares < 0 or not 1 <= min_ranks <= world_size:
        raise ValueError(
            f"a ring needs 1 <= min_ranks <= world_size and spares >= 0, got min_ranks {min_ranks}, "
            f"world_size {world_size}, spares {spares}"
        )
    if not heartbeat_s > 0:
        raise ValueError(f"a heartbeat is a positive number of seconds, got {heartbeat_s:g}")


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
        grace_s: how long the last checkpoint of a training that is interrupted may take.
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
        grace_s: float = 25.0,
        plan: FaultPlan = (),
        tell: Callable[[int, float], None] = lambda step, loss: None,
        say: Say = print,
    ) -> None:
        require_ring(world_size, spares=spares, min_ranks=min_ranks, heartbeat_s=heartbeat_s)
        settings = replace(settings or MemberSettings(num_threads=share.num_threads), run=secrets.token_hex(8))
        self._crew = Crew(spec, settings, share, heartbeat_s, say, self._strike)
        self._roster = Roster(
            self._crew, world_size=world_size, spares=spares, min_ranks=min_ranks, replace_s=replace_s, say=say
        )
        self._journal = Journal()
        self._calls = Calls(self._crew, self._roster, self._journal, stop_s, say)
        self._marks, self._run = settings.marks, settings.labels.get("run", "")
        self._events = Events(__name__, **settings.labels)
        self._spec, self._wait_s, self._max_failures, self._grace_s = spec, wait_s, max_failures, grace_s
        self._saves = settings.checkpoints is not None
        self._plan, self._tell, self._say = plan, tell, say
        self._store: Any = None

    def __enter__(self) -> TrainingCoordinator:
        """Makes ranks and spares. Raises TooFewResources, or TrainingFailed where a worker cannot be made."""
        from torch.distributed import TCPStore

        self._store = TCPStore(_host(), 0, None, True, wait_for_workers=False)
        try:
            self._roster.recruit(self._wait_s)
        except RayError as error:
            self.close()
            raise TrainingFailed(f"a worker could not be made: {cause_of(error)}") from error
        except BaseException:
            self.close()
            raise
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
        """Trains to ``spec.train_steps``. Where a KeyboardInterrupt ends it, a last checkpoint is written first.

        Args:
            resume: begin at the newest whole checkpoint.
            stretch: steps between two words of progress.
            evaluate: also find the bits per held-out byte.

        Raises:
            TrainingFailed: too few ranks are left, a step fails again and again, or a rank refuses its arguments.
        """
        try:
            return self._to_the_end(resume, stretch, evaluate)
        except KeyboardInterrupt:
            if self._saves:
                self._say(self._save_at_once())
            raise

    def _to_the_end(self, resume: bool, stretch: int, evaluate: bool) -> TrainingResult:
        step, failures, furthest, begin = None, 0, 0, time.perf_counter()
        while True:
            try:
                if step is None:
                    steps = self._form()
                    step = self._level(self._restore(steps, any_run=True) if resume else steps)
                while step < self._spec.train_steps:
                    step = self._train(min(self._spec.train_steps, (step // stretch + 1) * stretch))
                return self._result(evaluate, time.perf_counter() - begin)
            except Wreck as wreck:
                step = self._recover(wreck, resume)
                reached = max(step, self._journal.reached)
                if self._journal.recoveries[-1].filled != "grown":
                    failures = 1 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                if failures > self._max_failures:
                    raise TrainingFailed(f"step {reached} failed {failures} times, last with {wreck.lost}") from wreck

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """Those so far."""
        return tuple(self._journal.recoveries)

    def weights(self) -> list[Any]:
        """Rank 0's parameters, on the CPU: for tests and small models."""
        return self._calls.ask_all("weights")[0]

    def _train(self, until: int) -> int:
        """One stretch; returns the step reached."""
        self._calls.ask_all("train", until, watch=True)
        self._tell(until, self._journal.losses.get(until - 1, float("nan")))
        return until

    def _result(self, evaluate: bool, seconds: float) -> TrainingResult:
        bits = self._calls.ask_all("evaluate")[0] if evaluate else None
        digests = set(self._calls.ask_all("digest"))
        if len(digests) > 1:
            raise TrainingFailed(f"the ranks ended with different weights: {sorted(digests)}")
        return self._journal.result(digests.pop(), bits, self._roster.members.world_size, seconds)

    def _strike(self, worker: int, fault: Fault) -> None:
        strike(fault, worker, self._crew, self._roster.members, self._marks)

    def _save_at_once(self) -> str:
        """The rank that is furthest saves what it has; says how that went. All leave what they wait for: only between
        two steps is there something to save."""
        members, deadline = self._roster.members, time.monotonic() + self._grace_s
        steps = self._crew.steps(members.workers, self._grace_s / 5)
        self._crew.cancel(list(steps), members.generation, "the training is interrupted")
        if not steps:
            return "no checkpoint was written: no rank answers"
        furthest = max(steps, key=lambda worker: steps[worker])
        try:
            step = ray.get(self._crew.call(furthest, "checkpoint"), timeout=max(0.0, deadline - time.monotonic()))
        except RayError as error:
            return f"no checkpoint was written within {self._grace_s:g} s: {cause_of(error)}"
        return f"the checkpoint of step {step} is written" if step else "no checkpoint was written: no step is done"

    # ---- forming a ring --------------------------------------------------------------------------------------------

    def _form(self) -> list[int]:
        """All ranks of the present membership meet; returns the steps that each has applied, in rank order."""
        members = self._roster.members
        armed = self._plan[members.generation - 1] if members.generation <= len(self._plan) else ()
        seats = [
            Seat(members.generation, rank, members.world_size, _host(), self._store.port)
            for rank in range(members.world_size)
        ]
        stand = self._calls.gather(
            {w: self._crew.call(w, "join", seat, armed) for w, seat in zip(members.workers, seats, strict=True)}
        )
        self._events.tell("formed", generation=members.generation, world_size=members.world_size)
        return [progress.step for progress in stand]

    def _restore(self, steps: Sequence[int], *, any_run: bool) -> list[int]:
        """Rank 0 of the ring that was formed takes the newest checkpoint; returns the steps of all ranks. A run that
        was not to resume leaves alone what an earlier one wrote to the same folder."""
        first = self._roster.members.workers[0]
        restored = self._calls.gather({first: self._crew.call(first, "restore", any_run)})[0]
        none = "no checkpoint of this question was found: the training begins at step 0"
        self._say(f"resumed from the checkpoint of step {restored}" if restored else none)
        return [restored, *steps[1:]]

    def _level(self, steps: Sequence[int]) -> int:
        """Copies the state of the rank that is furthest to those behind it; returns its step."""
        furthest = max(steps)
        needy = [rank for rank, step in enumerate(steps) if step < furthest]
        if needy:
            self._calls.ask_all("level", steps.index(furthest), needy)
        return furthest

    # ---- recovery --------------------------------------------------------------------------------------------------

    def _recover(self, wreck: Wreck, resume: bool) -> int:
        """Brings the ring back; returns the step it goes on from."""
        broken, noticed_at, lost = self._roster.members.generation, wreck.noticed_at, dict(wreck.lost)
        reached = self._journal.reached
        for _ in range(max(1, self._max_failures)):
            filled, filled_at = self._roster.fill(wreck.lost), time.time()
            try:
                steps = self._form()
                formed_at = time.time()
                if not max(steps) and (reached or resume):
                    steps = self._restore(steps, any_run=resume)  # no survivor has a state: it comes from a checkpoint
                step = self._level(steps)
                break
            except Wreck as again:
                lost |= again.lost
                wreck = again
        else:
            raise TrainingFailed(f"the ring could not be formed again, {len(lost)} workers were lost: {lost}")
        self._tell_of(
            Recovery(
                generation=broken,
                lost=tuple(sorted(lost.items())),
                noticed_at=noticed_at,
                resumed_at=time.time(),
                step=step,
                steps_lost=max(0, reached - step),
                filled=filled,
                world_size=self._roster.members.world_size,
                filled_at=filled_at,
                formed_at=formed_at,
            )
        )
        return step

    def _tell_of(self, recovery: Recovery) -> None:
        """Counted, said and logged."""
        generation, size = self._roster.members.generation, recovery.world_size
        self._journal.recoveries.append(recovery)
        REBUILDS.inc(1, {"run": self._run, "filled": recovery.filled})
        self._say(
            f"generation {generation} of {size} ranks goes on at step {recovery.step} after "
            f"{recovery.resumed_in_s:.2f} s ({recovery.reasons})"
        )
        self._events.tell(
            "recovered",
            generation=generation,
            step=recovery.step,
            steps_lost=recovery.steps_lost,
            seconds=recovery.resumed_in_s,
            filled=recovery.filled,
            world_size=size,
            lost=recovery.reasons,
        )


def _host() -> str:
    return ray.util.get_node_ip_address()
