"""Calls: what all ranks of a ring are asked at once, and what the first trouble of any of them makes of it."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raybsa.cluster.causes import whose
from raybsa.cluster.checkpoint import CheckpointNotWritten
from raybsa.cluster.crew import TICK_S, Crew, cause_of
from raybsa.cluster.journal import Journal, TrainingFailed
from raybsa.cluster.member import Progress
from raybsa.cluster.resources import Say
from raybsa.cluster.roster import Roster
from raybsa.comm import Broken
from raybsa.results.record import QUESTION


class Wreck(Exception):
    """The running generation broke: an event on the coordinator's own way, never seen outside.

    Args:
        lost: workers and why; empty where the ring may grow, or broke without a loss.
    """

    def __init__(self, lost: dict[int, str]) -> None:
        super().__init__(str(lost))
        self.lost, self.noticed_at = lost, time.time()


class Calls:
    """Asks the ranks of the present membership.

    Args:
        crew, roster: who is asked.
        journal: takes all progress that a rank tells, also while the ring breaks.
        stop_s: how long a rank that does answer may take to leave a broken ring: it first ends what it computes.
        say: hears what a rank could not write.
    """

    def __init__(self, crew: Crew, roster: Roster, journal: Journal, stop_s: float, say: Say = print) -> None:
        self._crew, self._roster, self._journal, self._stop_s, self._say = crew, roster, journal, stop_s, say

    def ask_all(self, method: str, *arguments: Any, watch: bool = False) -> list[Any]:
        """The method's result on every rank, in rank order. ``watch``: a worker that arrives meanwhile ends it."""
        workers = self._roster.members.workers
        return self.gather({worker: self._crew.call(worker, method, *arguments) for worker in workers}, watch=watch)

    def gather(self, references: dict[int, Any], *, watch: bool = False) -> list[Any]:
        """What ``references`` by worker lead to, in their order, while the workers' pulse is watched.

        Raises:
            Wreck: at the first trouble, with all who are lost; the others are free.
            TrainingFailed: a worker refuses its arguments, its program is wrong, or a checkpoint cannot be written.
        """
        waiting, results = dict(references), {}
        while waiting:
            ready, _ = ray.wait(list(waiting.values()), num_returns=1, timeout=TICK_S)
            for worker in [w for w, reference in waiting.items() if reference in ready]:
                try:
                    results[worker] = self._hear(waiting.pop(worker))
                except RayError as error:
                    _check_question(error)
                    raise self.wreck(_blame(worker, error), waiting) from error
            lost = self._crew.silent(waiting)
            if watch:
                self._roster.mind_spares()
            if lost or (watch and self._roster.may_grow()):
                raise self.wreck(lost, waiting)
        return [results[worker] for worker in references]

    def wreck(self, lost: dict[int, str], waiting: dict[int, Any]) -> Wreck:
        """Cancels the others and waits until each is free or known to be lost. A rank that is alive may first have to
        end what it computes."""
        wreck = Wreck(lost)
        members = self._roster.members
        others = [worker for worker in members.workers if worker not in lost]
        cancels = self._crew.cancel(others, members.generation, "the ring broke")
        wanted = [(w, reference) for w, reference in (*cancels.items(), *waiting.items()) if w not in lost]
        deadline = time.monotonic() + self._stop_s
        while wanted:
            ready, _ = ray.wait([reference for _, reference in wanted], num_returns=1, timeout=TICK_S)
            for worker, reference in [each for each in wanted if each[1] in ready]:
                try:
                    self._hear(reference)
                except RayError as error:
                    wreck.lost |= _blame(worker, error)
            wanted = [each for each in wanted if each[1] not in ready and each[0] not in wreck.lost]
            wreck.lost |= self._crew.silent({worker for worker, _ in wanted})
            if time.monotonic() > deadline:
                wreck.lost |= {worker: f"did not stop within {self._stop_s:g} s" for worker, _ in wanted}
            wanted = [each for each in wanted if each[0] not in wreck.lost]
        return wreck

    def _hear(self, reference: Any) -> Any:
        result = ray.get(reference)
        if isinstance(result, Progress):
            self._journal.take(result)
            for trouble in result.troubles:
                self._say(trouble)
        return result


def _check_question(error: RayError) -> None:
    """Arguments that a worker refuses will be refused by any other too; and a program that is wrong may fail after each
    step anew, where no bound on the failures of one step would end it. A disk is as full for any other rank."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, CheckpointNotWritten):
        raise TrainingFailed(f"{error.cause}: mend that, and the same command with --resume goes on") from error
    if isinstance(error, RayTaskError) and whose(error) == QUESTION:
        raise TrainingFailed(f"a rank refused what it was asked for, as any other would: {cause_of(error)}") from error


def _blame(worker: int, error: RayError) -> dict[int, str]:
    """The worker is lost unless it only lost its peers."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return {} if isinstance(cause, Broken) else {worker: cause_of(error)}
