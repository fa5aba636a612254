"""The ranks of this host, one process a rank: ProcessRing asks them, measure_rings asks all trials of a list.

On the CPU ranks are processes of one thread, on CUDA one process a GPU.
"""

from __future__ import annotations

import os
import queue
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raybsa.scratch import scratch
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import ring_params
from raybsa.tasks.ring_rank import Answer, RingRank, devices_of, joined, place_of
from raybsa.timing import DeviceLock

RANK_ERRORS = (RuntimeError, mp.ProcessRaisedException, mp.ProcessExitedException)


class ProcessRing:
    """A ring of processes while it is entered; nobody else computes on the ranks' devices meanwhile.

    Args:
        world_size: ranks.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, world_size: int, device: str) -> None:
        self.world_size, self.device, self.devices = world_size, device, devices_of(device)

    def __enter__(self) -> ProcessRing:
        context = mp.get_context("spawn")
        self._reports: Any = context.Queue()
        self._questions: list[Any] = [context.Queue() for _ in range(self.world_size)]
        self._held = ExitStack()
        places = ["cpu"] if self.device == "cpu" else [f"cuda:{rank}" for rank in range(self.world_size)]
        for place in places:
            self._held.enter_context(DeviceLock(place).exclusive())
        store = os.path.join(self._held.enter_context(scratch("ring")), "store")
        arguments = (self.world_size, store, self.device, self._questions, self._reports)
        self._ranks = mp.start_processes(_rank, arguments, nprocs=self.world_size, join=False, start_method="spawn")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for questions in self._questions:
            questions.put(None)
        for process in self._ranks.processes:
            process.join(10 if kind is None else 0.1)
            process.terminate()
            process.join()
        self._held.close()

    def ask(self, method: str, *arguments: Any, limit_s: float | None = None) -> list[Any]:
        """What the method of ``RingRank`` gives on every rank, in rank order.

        Raises:
            RANK_ERRORS: what a rank raised, that one died, or that it took longer than ``limit_s``; leave the ring
                then.
        """
        for questions in self._questions:
            questions.put((method, arguments))
        found: dict[int, Any] = {}
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while len(found) < self.world_size:
            try:
                rank, answer = self._reports.get(timeout=0.5)
                found[rank] = answer
            except queue.Empty:
                if self._ranks.join(timeout=0.01):
                    raise RuntimeError("the ranks ended without a report") from None
                if deadline is not None and time.monotonic() > deadline:
                    raise RuntimeError(f"took longer than {limit_s:.0f} s") from None
        return [found[rank] for rank in sorted(found)]


def measure_rings(
    specs: Sequence[TrialSpec], *, device: str | None = None, repeats: int = 20, budget_s: float = 2.0
) -> Iterator[tuple[TrialSpec, Answer]]:
    """Every trial's measurement, or why there is none, as they come. Trials of one world size share their processes,
    until one fails: the next has fresh ones.

    Args:
        specs: of task ``"ring"``; their ``task_params`` say how many ranks.
        device: ``"cpu"`` or ``"cuda"``; None takes the GPUs where there are any.
        repeats, budget_s: of each trial, as in ``measure_rank``.

    Raises:
        ValueError: a trial that is not one of a ring, or more ranks than GPUs.
    """
    device = device or default_device()
    by_world: dict[int, deque[TrialSpec]] = defaultdict(deque)
    for spec in specs:
        by_world[ring_params(spec)[0]].append(spec)
    if device == "cuda" and max(by_world, default=0) > torch.cuda.device_count():
        raise ValueError(f"{max(by_world)} ranks need as many GPUs, this host has {torch.cuda.device_count()}")
    for world_size, waiting in by_world.items():
        while waiting:
            try:
                with ProcessRing(world_size, device) as ring:
                    calibration = ring.ask("calibrate", waiting[0])[0]
                    while waiting:
                        reports = ring.ask("measure", waiting[0], repeats, budget_s)
                        answer = joined(waiting[0], reports, device, ring.devices, calibration)
                        yield waiting.popleft(), answer
            except RANK_ERRORS as error:
                yield waiting.popleft(), said_by(error)


def default_device() -> str:
    """``"cuda"`` where there is a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def said_by(error: BaseException) -> str:
    """What a rank raised, in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def _rank(rank: int, world_size: int, store: str, device: str, questions: Sequence[Any], reports: Any) -> None:
    """One process: joins the group and answers until there is nothing more to ask."""
    ring_rank = RingRank(rank, world_size, dist.FileStore(store, world_size), place_of(device, rank))
    try:
        while (asked := questions[rank].get()) is not None:
            method, arguments = asked
            reports.put((rank, getattr(ring_rank, method)(*arguments)))
    finally:
        ring_rank.close()
