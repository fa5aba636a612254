"""Ray actors that form a ring, each with a GPU or a share of CPUs of its own, and the ring trials that they measure.

The measurement is that of ``tasks/ring_rank.py``, and so are the rows. Only questions and reports pass through Ray;
tensors go from rank to rank. A ring that failed ends with its trial, and the next trial has a fresh one.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raybsa.cluster.crew import cause_of
from raybsa.cluster.resources import Say, Share, await_workers
from raybsa.cluster.versions import require, versions
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import ring_params
from raybsa.tasks.ring_rank import Answer, RingRank, joined, place_of
from raybsa.timing import DeviceLock


class RingActor:
    """The actor: one rank, which holds its device's lock while others must not compute there."""

    def __init__(self, wanted: dict[str, str], device: str, num_threads: int) -> None:
        require(wanted)
        self._device, self._num_threads = device, num_threads
        self._locks = ExitStack()
        self._rank: RingRank

    def host(self) -> str:
        """Its machine. Also the sign that the actor is up."""
        return ray.util.get_node_ip_address()

    def lock(self, alone: bool) -> None:
        """Holds the device from now on, ``alone`` or with others who compute; waits for those who must leave it."""
        lock = DeviceLock(self._device)
        self._locks.enter_context(lock.exclusive() if alone else lock.shared())

    def unlock(self) -> None:
        self._locks.close()

    def join(self, rank: int, world_size: int, host: str, port: int, bind: bool) -> int:
        """Takes its place; returns how many devices its process may use."""
        store, place = dist.TCPStore(host, port, None, False), place_of(self._device)
        self._rank = RingRank(rank, world_size, store, place, num_threads=self._num_threads, bind=bind)
        return self._rank.devices

    def call(self, method: str, *arguments: Any) -> Any:
        """Any method of the rank."""
        return getattr(self._rank, method)(*arguments)


class ActorRing:
    """A ring of actors; a context manager that makes them on entering.

    Args:
        world_size: ranks.
        share: what each owns.
        wait_s: the longest wait for them to come up.
        limit_s: the longest that a call on all of them may take.
        say: where messages go.
        group: a placement group with one bundle a rank; None lets Ray place them.
        alone: nobody else computes on its devices while it lives; else only where it is ``held``.

    Attributes:
        devices: cores of the machines on which the ranks lie, or GPUs of the cluster.
    """

    def __init__(
        self,
        world_size: int,
        share: Share,
        *,
        wait_s: float,
        limit_s: float,
        say: Say,
        group: PlacementGroup | None = None,
        alone: bool = True,
    ) -> None:
        self._world_size, self._share, self._wait_s, self._limit_s, self._say = world_size, share, wait_s, limit_s, say
        self._group, self._alone = group, alone
        self._actors: list[Any] = []
        self._keepers: list[Any] = []
        self.devices = 0

    def __enter__(self) -> ActorRing:
        """Raises TooFewResources, or RayError where an actor cannot be made or join."""
        try:
            self._actors = [self._actor(rank) for rank in range(self._world_size)]
            signs = [actor.host.remote() for actor in self._actors]
            await_workers(signs, self._share, self._wait_s, self._say)
            hosts: list[str] = ray.get(signs)
            first = dict(zip(hosts, self._actors, strict=True))
            self._keepers = self._actors if self._share.num_gpus else [first[host] for host in sorted(first)]
            if self._alone:
                self._lock(alone=True)
            self._store = dist.TCPStore(ray.util.get_node_ip_address(), 0, None, True, wait_for_workers=False)
            place = (self._world_size, self._store.host, self._store.port, self._alone)
            seats = [(rank, *place) for rank in range(self._world_size)]
            devices = self._gather([a.join.remote(*seat) for a, seat in zip(self._actors, seats, strict=True)])
            gpus = int(ray.cluster_resources().get("GPU", 0))
            self.devices = gpus if self._share.num_gpus else sum(dict(zip(hosts, devices, strict=True)).values())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors, and with them their locks; safe to call twice."""
        self._keepers = []
        while self._actors:
            actor = self._actors.pop()
            if ray.is_initialized():
                ray.kill(actor)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What the method of ``RingRank`` gives on every rank, in rank order.

        Raises:
            RayError: the first that a rank raised, or that it died. The ring is then not to be used.
            TimeoutError: some rank took longer than ``limit_s``.
        """
        return self._gather([actor.call.remote(method, *arguments) for actor in self._actors])

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:
        """Meanwhile the ring computes: ``alone`` on its devices, or beside others who compute. Not for a ring that has
        them alone anyway, and not to be used again where it raises."""
        self._lock(alone)
        yield
        self._gather([actor.unlock.remote() for actor in self._keepers])

    def _actor(self, rank: int) -> Any:
        actor: Any = ray.remote(RingActor)
        options: dict[str, Any] = {"num_cpus": self._share.num_cpus, "num_gpus": self._share.num_gpus}
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=rank
            )
        return actor.options(**options).remote(versions(), self._share.device, self._share.num_threads)

    def _lock(self, alone: bool) -> None:
        """On each machine one rank stands for all that compute on its cores; each has its GPU. One after the other, so
        that two rings of one machine do not wait for each other."""
        for actor in self._keepers:
            self._gather([actor.lock.remote(alone)])

    def _gather(self, references: Sequence[Any]) -> list[Any]:
        """All results; a rank that failed is heard of at once, though the others still wait for it."""
        waiting, deadline = list(references), time.monotonic() + self._limit_s
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"took longer than {self._limit_s:g} s")
            ray.get(ready)
        return ray.get(list(references))


def measure_rings_on_actors(
    specs: Sequence[TrialSpec],
    share: Share,
    *,
    wait_s: float = 60.0,
    limit_s: float = 1800.0,
    repeats: int = 20,
    budget_s: float = 2.0,
    say: Say = print,
) -> Iterator[tuple[TrialSpec, Answer]]:
    """Every trial's measurement, or why there is none, as they come. Trials in a row of one world size share a ring.

    Args:
        specs: of task ``"ring"``; their ``task_params`` say how many ranks.
        share: what each rank owns.
        wait_s, limit_s: the longest wait for a ring to come up, and for one trial.
        repeats, budget_s: of each trial, as in ``measure_rank``.

    Raises:
        ValueError: a trial that is not one of a ring.
        TooFewResources: the cluster cannot hold a ring, or its actors were too slow to start.
    """
    by_world: dict[int, deque[TrialSpec]] = defaultdict(deque)
    for spec in specs:
        by_world[ring_params(spec)[0]].append(spec)
    for world_size, waiting in by_world.items():
        while waiting:
            try:
                with ActorRing(world_size, share, wait_s=wait_s, limit_s=limit_s, say=say) as ring:
                    calibration = ring.ask("calibrate", waiting[0])[0]
                    while waiting:
                        reports = ring.ask("measure", waiting[0], repeats, budget_s)
                        answer = joined(waiting[0], reports, share.device, ring.devices, calibration)
                        yield waiting.popleft(), answer
            except (RayError, TimeoutError) as error:
                yield waiting.popleft(), cause_of(error) if isinstance(error, RayError) else f"TimeoutError: {error}"
