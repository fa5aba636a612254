"""Membership: who is in the ring, in which order, and how that changes when some are lost. Pure data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Membership:
    """One generation of a ring.

    Args:
        generation: counts the memberships of a training, from 1.
        workers: their ids in rank order.
    """

    generation: int
    workers: tuple[int, ...]

    @property
    def world_size(self) -> int:
        return len(self.workers)

    def rank(self, worker: int) -> int:
        return self.workers.index(worker)

    def after_loss(self, lost: Collection[int], fresh: Sequence[int]) -> Membership:
        """The next generation: each lost worker's rank goes to the next of ``fresh``; where they do not suffice, the
        ranks that are left over close up, and the ring shrinks."""
        stand_ins = iter(fresh)
        seats = [next(stand_ins, None) if worker in lost else worker for worker in self.workers]
        return Membership(self.generation + 1, tuple(worker for worker in seats if worker is not None))

    def grown(self, fresh: Sequence[int]) -> Membership:
        """The next generation, with ``fresh`` workers behind those that are here."""
        return Membership(self.generation + 1, (*self.workers, *fresh))


@dataclass(frozen=True)
class Seat:
    """What a worker needs to take its place: the store where the ranks meet, and who sits where."""

    generation: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
