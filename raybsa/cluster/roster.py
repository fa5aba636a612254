"""Roster: who has which rank, and who comes where one is lost: a spare, a fresh worker, else the ring shrinks."""

from __future__ import annotations

from collections.abc import Mapping

from raybsa.cluster.crew import Crew
from raybsa.cluster.journal import TrainingFailed
from raybsa.cluster.membership import Membership
from raybsa.cluster.resources import Say


class Roster:
    """Keeps a ring as full as its crew lets it.

    Args:
        crew: makes and ends the workers.
        world_size: ranks wanted.
        spares: warm workers wanted beside them.
        min_ranks: the fewest ranks to go on with.
        replace_s: how long a lost rank without a spare waits for a fresh worker before the ring shrinks.
        say: where messages go.

    Attributes:
        members: the present membership.
    """

    def __init__(self, crew: Crew, *, world_size: int, spares: int, min_ranks: int, replace_s: float, say: Say) -> None:
        self._crew, self._say = crew, say
        self._wanted, self._num_spares, self._min_ranks, self._replace_s = world_size, spares, min_ranks, replace_s
        self.members = Membership(0, ())

    def recruit(self, wait_s: float) -> None:
        """The first membership. Raises TooFewResources, or RayError where a worker cannot be made."""
        workers = self._crew.recruit(self._wanted + self._num_spares, wait_s)
        self.members = Membership(1, tuple(workers[: self._wanted]))
        self._crew.spares = workers[self._wanted :]

    def fill(self, lost: Mapping[int, str]) -> str:
        """The next membership, without those that are ``lost`` (and why); says how the empty ranks were filled.

        Raises:
            TrainingFailed: too few ranks are left.
        """
        for worker in lost:
            self._crew.lose(worker)
        missing = sum(worker in lost for worker in self.members.workers)
        if missing:
            spares = set(self._crew.spares)
            fresh = self._crew.stand_ins(missing, self._replace_s)
            filled = "shrunk" if len(fresh) < missing else "spare" if spares >= set(fresh) else "fresh"
            self.members = self.members.after_loss(lost, fresh)
        else:
            fresh = self._crew.take_arrived(self._wanted - self.members.world_size)
            filled = "grown" if fresh else "as it was"
            self.members = self.members.grown(fresh)
        size = self.members.world_size
        if size < self._min_ranks:
            raise TrainingFailed(f"{size} ranks are left, at least {self._min_ranks} are wanted: {lost}")
        self._order()
        return filled

    def mind_spares(self) -> None:
        """A spare that died makes way for a fresh one before it is needed."""
        lost = self._crew.silent(self._crew.spares)
        for spare, why in lost.items():
            self._say(f"spare {spare} is lost: {why}")
            self._crew.spares.remove(spare)
            self._crew.lose(spare)
        if lost:
            self._order()

    def may_grow(self) -> bool:
        """Whether a worker has arrived for an empty rank. Those that the ring does not need become spares."""
        if not self._crew.arriving or not self._crew.has_arrived():
            return False
        if self.members.world_size < self._wanted:
            return True
        self._crew.spares += self._crew.take_arrived(self._num_spares - len(self._crew.spares))
        return False

    def _order(self) -> None:
        """Asks for all that are missing."""
        self._crew.order(self._wanted - self.members.world_size + self._num_spares - len(self._crew.spares))
