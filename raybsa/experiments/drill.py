"""Drill: trainings that are broken on purpose, each compared with the same training left in peace."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from raybsa.cluster.faults import Fault, FaultKind, FaultPlace, FaultPlan, mark_file
from raybsa.cluster.journal import Recovery, TrainingResult
from raybsa.cluster.member import MemberSettings
from raybsa.experiments.drill_driver import kill_and_resume
from raybsa.experiments.drill_plan import EVERY, Pair, plan_of, question, steps_for
from raybsa.experiments.drill_ring import Ring
from raybsa.experiments.recording import Run
from raybsa.experiments.trained import write_training
from raybsa.results.store import Store
from raybsa.scratch import scratch


@dataclass(frozen=True)
class Survived:
    """What one fault led to.

    Args:
        fault: what was to happen.
        noticed_in_s: from the blow to when the coordinator knew; None while recovering, where it knows already.
        resumed_in_s: from then (after the driver's death: from the blow) to when all ranks could train again; None
            where the fault never struck.
        steps_lost: applied steps that were made again.
        filled: how the ring was filled.
        equal: whether the final state is that of the run in peace, to the bit.
        struck_again: whether the next fault was to strike in the recovery from this one.
    """

    fault: Fault
    noticed_in_s: float | None
    resumed_in_s: float | None
    steps_lost: int
    filled: str
    equal: bool
    struck_again: bool = False

    @property
    def good(self) -> bool:
        return self.equal and self.resumed_in_s is not None


class Drill:
    """Runs of one question: one in peace for each length, and one for each plan.

    Args:
        ring: how it trains.
        store, run: where each training becomes a record.
        seed: which ranks are hit.
    """

    def __init__(self, ring: Ring, store: Store, run: Run, seed: int) -> None:
        self._ring, self._store, self._run, self._random = ring, store, run, Random(seed)
        self._peace: dict[int, TrainingResult] = {}
        self._runs = 0

    def in_peace(self, steps: int) -> TrainingResult:
        """The undisturbed training, made once."""
        if steps not in self._peace:
            with scratch("drill") as folder:
                self._peace[steps] = self.train(steps, self._settings(folder))
        return self._peace[steps]

    def survive(self, pairs: Sequence[Pair]) -> Iterator[Survived]:
        """Injects the faults into one run; what became of each."""
        steps, plan = steps_for(pairs), plan_of(pairs, self._ring.world_size, self._random)
        wanted = self.in_peace(steps)
        with scratch("drill") as folder:
            settings = self._settings(folder)
            if pairs[0][0] is FaultKind.DRIVER:
                begun, result = kill_and_resume(self._ring, steps, settings, plan)
                self._write(steps, settings, result)
                yield self._after_driver(plan, settings, begun, result, result.digest == wanted.digest)
            else:
                result = self.train(steps, settings, plan)
                yield from survived(plan, settings, result.recoveries, result.digest == wanted.digest)

    def train(self, steps: int, settings: MemberSettings, plan: FaultPlan = (), **options) -> TrainingResult:
        with self._ring.coordinator(steps, settings, plan, **options) as coordinator:
            result = coordinator.run(evaluate=False, stretch=EVERY)
        found = {generation: _struck_at(settings, fault) for generation, (fault,) in enumerate(plan, 1)}
        self._write(steps, settings, result, {generation: at for generation, at in found.items() if at is not None})
        return result

    def _write(
        self, steps: int, settings: MemberSettings, result: TrainingResult, struck_at: Mapping[int, float] | None = None
    ) -> None:
        spec = question(steps, self._ring.text)
        write_training(self._store, self._run, self._runs, spec, settings, self._ring.share.device, result, struck_at)
        self._runs += 1

    def _settings(self, folder: str) -> MemberSettings:
        marks = os.path.join(folder, "marks")
        os.makedirs(marks, exist_ok=True)
        checkpoints, labels = os.path.join(folder, "checkpoints"), self._run.labels(self._runs)
        return MemberSettings(checkpoints=checkpoints, checkpoint_every=EVERY, marks=marks, labels=labels)

    def _after_driver(
        self, plan: FaultPlan, settings: MemberSettings, begun: float, result: TrainingResult, equal: bool
    ) -> Survived:
        (fault,) = plan[-1]
        struck = _struck_at(settings, fault)
        first = min(result.losses, default=0)
        reached = max(faults[0].step for faults in plan)
        return Survived(fault, None, struck and begun - struck, max(0, reached - first), "resumed", equal)


def survived(
    plan: FaultPlan, settings: MemberSettings, recoveries: Sequence[Recovery], equal: bool
) -> Iterator[Survived]:
    """A row a fault: the k-th was armed in the k-th generation; one that struck while recovering shares its recovery
    with the fault before."""
    by_generation = {recovery.generation: recovery for recovery in recoveries}
    recovery: Recovery | None = None
    for generation, (fault,) in enumerate(plan, 1):
        recovery = by_generation.get(generation, recovery)
        struck = _struck_at(settings, fault)
        again = any(following.place is FaultPlace.RECOVERY for (following,) in plan[generation : generation + 1])
        if recovery is None or struck is None:
            yield Survived(fault, None, None, 0, "-", equal, again)
            continue
        noticed = None if fault.place is FaultPlace.RECOVERY else recovery.noticed_at - struck
        yield Survived(fault, noticed, recovery.resumed_in_s, recovery.steps_lost, recovery.filled, equal, again)


def _struck_at(settings: MemberSettings, fault: Fault) -> float | None:
    assert settings.marks is not None
    mark = mark_file(settings.marks, fault)
    return float(mark.read_text()) if mark.exists() else None


def estimate_minutes(groups: Sequence[Sequence[Pair]], ring: Ring, seconds_in_peace: float) -> float:
    """How long a drill will take: a run each (two where the driver dies), and for each fault the time to make a worker
    and, on the whole, half a heartbeat."""
    runs = sum(2 if pairs[0][0] is FaultKind.DRIVER else 1 for pairs in groups)
    faults = sum(len(pairs) for pairs in groups)
    return (runs * seconds_in_peace + faults * (ring.heartbeat_s / 2 + seconds_in_peace / 8)) / 60


def timed(drill: Drill, steps: int) -> float:
    """Seconds of the run in peace."""
    begin = time.perf_counter()
    drill.in_peace(steps)
    return time.perf_counter() - begin
