"""measure_rings: ring trials on the ranks of this host, one process a rank, from start to joined measurements.

On the CPU ranks are processes of one thread that talk over gloo, each bound to a core, on CUDA one process a GPU over
NCCL. Bound, because a scheduler that is left to itself often wakes several ranks on one core when a barrier lets them
go, and leaves them there for some 10 ms while another core has nothing to do.
"""

from __future__ import annotations

import datetime
import os
import platform
import queue
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raybsa.comm import Communicator
from raybsa.results.record import Measurement
from raybsa.ring.timeline import Point, Span, as_points
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import RankReport, measure_crowding, measure_link, measure_rank, ring_params, ring_plan
from raybsa.timing import DeviceLock, Quantiles, device_name, quantiles_of

LINK = "link_ms"  # the series of timed messages: step is the bytes
CROWDING = "crowding"  # how many times slower a kernel is where step of them run at once
_TIMEOUT_S = 300.0
Answer = Measurement | str  # a string says what went wrong


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
                found = sorted(_next(reports, ranks, world_size), key=lambda report: report.rank)
                yield _joined(spec, found, device, calibration)
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
    torch.set_num_threads(1)
    devices = _devices(device)
    if device == "cpu":
        bind_to_core(rank)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    limit = datetime.timedelta(seconds=_TIMEOUT_S)
    shared = dist.FileStore(store, world_size)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=shared, rank=rank, world_size=world_size, timeout=limit)
    communicator = Communicator(dist.group.WORLD, device=place, timeout_s=_TIMEOUT_S)
    try:
        points: list[Point] = [(LINK, nbytes, 0, ms) for nbytes, ms in measure_link(communicator)]
        with suppress(ValueError):  # a question that cannot be asked says so in its own turn
            points.append((CROWDING, world_size, 0, measure_crowding(specs[0], communicator, devices)))
        if rank == 0:
            reports.put(points)
        for spec in specs:
            reports.put(measure_rank(spec, communicator, repeats=repeats, budget_s=budget_s))
    finally:
        communicator.close()
        dist.destroy_process_group()


def bind_to_core(rank: int) -> None:
    """This thread, and all that it starts later, stay on one of the process's cores; ranks take them in turn."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _devices(device: str) -> int:
    """GPUs of this host, or cores of this process."""
    return torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))


def _joined(spec: TrialSpec, reports: list[RankReport], device: str, calibration: list[Point]) -> Measurement:
    """One measurement from all ranks': the slowest rank's time of each round, all bytes, the fullest rank's memory."""
    plan, first = ring_plan(spec), reports[0]
    itemsize = getattr(torch, spec.dtype).itemsize
    sizes = (spec.num_kv_heads or spec.num_heads, spec.head_dim, itemsize, spec.batch)
    forward, both = (_slowest(reports, name) for name in ("forward", "forward_backward"))
    begun = min(report.begun_s for report in reports) if device == "cpu" else None
    spans = [_moved(span, 0.0 if begun is None else r.begun_s - begun) for r in reports for span in r.spans]
    assert first.errors is not None
    return Measurement(
        density=plan.layout.density,
        forward_ms_p20=forward.p20,
        forward_ms_p50=forward.p50,
        forward_ms_p80=forward.p80,
        forward_backward_ms_p20=both.p20,
        forward_backward_ms_p50=both.p50,
        forward_backward_ms_p80=both.p80,
        peak_bytes=max(report.peak_bytes for report in reports),
        wire_bytes=sum(report.forward_backward_bytes for report in reports),
        wire_forward_bytes=sum(report.forward_bytes for report in reports),
        needed_forward_bytes=plan.bytes_needed(*sizes),
        world_size=len(reports),
        devices=_devices(device),
        partition=ring_params(spec)[1],
        imbalance=plan.imbalance,
        single_forward_ms_p50=quantiles_of(first.times_ms["single_forward"]).p50,
        single_forward_backward_ms_p50=quantiles_of(first.times_ms["single_forward_backward"]).p50,
        error_forward=first.errors[0],
        error_gradient=first.errors[1],
        device=device,
        device_name=device_name(torch.device(device)),
        num_threads=1,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        rank_curves=(*as_points(spans), *calibration),
    )


def _slowest(reports: list[RankReport], name: str) -> Quantiles:
    return quantiles_of([max(times) for times in zip(*(report.times_ms[name] for report in reports), strict=True)])


def _moved(span: Span, seconds: float) -> Span:
    return span._replace(begin_s=span.begin_s + seconds, end_s=span.end_s + seconds)
