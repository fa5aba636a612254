"""measure_rings: ring trials on the ranks of this host, one process a rank, from start to joined measurements.

On the CPU ranks are processes of one thread, on CUDA one process a GPU.
"""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raybsa.ring.timeline import Point
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import ring_params
from raybsa.tasks.ring_rank import Answer, RingRank, devices_of, joined
from raybsa.timing import DeviceLock


def measure_rings(
    specs: Sequence[TrialSpec], *, device: str | None = None, repeats: int = 20, budget_s: float = 2.0
) -> Iterator[tuple[TrialSpec, Answer]]:
    """Every trial's measurement, or why there is none, as they come. Trials of one world size share their processes.

    Args:
        specs: of task ``"ring"``; their ``task_params`` say how many ranks.
        device: ``"cpu"`` or ``"cuda"``; None takes the GPUs where there are any.
        repeats, budget_s: of each trial, as in ``measure_rank``.

    Raises:
        ValueError: a trial that is not one of a ring, or more ranks than GPUs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    worlds = [ring_params(spec)[0] for spec in specs]
    if device == "cuda" and max(worlds, default=0) > torch.cuda.device_count():
        raise ValueError(f"{max(worlds)} ranks need as many GPUs, this host has {torch.cuda.device_count()}")
    for world_size in dict.fromkeys(worlds):
        group = [spec for spec, world in zip(specs, worlds, strict=True) if world == world_size]
        yield from zip(group, _group(group, world_size, device, repeats, budget_s), strict=True)


def _group(specs: list[TrialSpec], world_size: int, device: str, repeats: int, budget_s: float) -> Iterator[Answer]:
    context = mp.get_context("spawn")
    reports: Any = context.Queue()
    with _alone_on(device, world_size), tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, os.path.join(folder, "store"), device, specs, repeats, budget_s, reports)
        ranks = mp.start_processes(_rank, arguments, nprocs=world_size, join=False, start_method="spawn")
        done = 0
        try:
            calibration: list[Point] = _next(reports, ranks, 1)[0]
            for spec in specs:
                found = _next(reports, ranks, world_size)
                yield joined(spec, found, device, devices_of(device), calibration)
                done += 1
        except (RuntimeError, mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            for _ in specs[done:]:
                yield f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        finally:
            for process in ranks.processes:
                process.join(10)
                process.terminate()


@contextmanager
def _alone_on(device: str, world_size: int) -> Iterator[None]:
    """Nobody else computes on the devices of the ranks meanwhile."""
    places = ["cpu"] if device == "cpu" else [f"cuda:{rank}" for rank in range(world_size)]
    with ExitStack() as locks:
        for place in places:
            locks.enter_context(DeviceLock(place).exclusive())
        yield


def _next(reports: Any, ranks: Any, count: int) -> list[Any]:
    """The next ``count`` things that ranks report; raises what a rank raised."""
    found: list[Any] = []
    while len(found) < count:
        try:
            found.append(reports.get(timeout=0.5))
        except queue.Empty:
            if ranks.join(timeout=0.01):
                raise RuntimeError("the ranks ended without a report") from None
    return found


def _rank(
    rank: int,
    world_size: int,
    store: str,
    device: str,
    specs: list[TrialSpec],
    repeats: int,
    budget_s: float,
    reports: Any,
) -> None:
    """One process: joins the group, measures the link, then every trial."""
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    ring_rank = RingRank(rank, world_size, dist.FileStore(store, world_size), place)
    try:
        points = ring_rank.calibrate(specs[0])
        if rank == 0:
            reports.put(points)
        for spec in specs:
            reports.put(ring_rank.measure(spec, repeats=repeats, budget_s=budget_s))
    finally:
        ring_rank.close()
