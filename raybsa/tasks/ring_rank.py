"""RingRank: one rank of rings that are measured, wherever its process comes from, and how all ranks' reports become one
measurement.

On the CPU ranks talk over gloo. One that computes with one thread is bound to a core, because a scheduler that is left
to itself often wakes several ranks on one core when a barrier lets them go, and leaves them there for some 10 ms while
another core has nothing to do. On CUDA each rank has a GPU, and they talk over NCCL.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from raybsa.comm import Communicator, process_group
from raybsa.results.record import Measurement
from raybsa.ring.timeline import Point, Span, as_points
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import RankReport, measure_crowding, measure_link, measure_rank, ring_params, ring_plan
from raybsa.timing import Quantiles, quantiles_of

LINK = "link_ms"  # the series of timed messages: step is the bytes
CROWDING = "crowding"  # how many times slower a kernel is where step of them run at once
TIMEOUT_S = 300.0
Answer = Measurement | str  # a string says what went wrong


class RingRank:
    """Joins its group on being made; every rank then makes the same calls in the same order.

    Args:
        rank, world_size: its place.
        store: of ``torch.distributed``, where the ranks meet.
        place: its device.
        num_threads: CPU threads of PyTorch.

    Attributes:
        devices: GPUs that this process sees, or the cores that it had before it was bound to one.
    """

    def __init__(self, rank: int, world_size: int, store: Any, place: torch.device, *, num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.devices = devices_of(place.type)
        if place.type == "cpu" and num_threads == 1:
            bind_to_core(rank)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        group = process_group(place, store, rank, world_size, TIMEOUT_S)
        self._communicator = Communicator(group, device=place, timeout_s=TIMEOUT_S)

    def calibrate(self, spec: TrialSpec) -> list[Point]:
        """The link's timed messages, and how ranks slow each other down in ``spec``'s kernel (nothing of it where the
        question cannot be asked, which it says in its own turn)."""
        communicator = self._communicator
        points: list[Point] = [(LINK, nbytes, 0, ms) for nbytes, ms in measure_link(communicator)]
        with suppress(ValueError):
            slow = measure_crowding(spec, communicator, self.devices)
            points.append((CROWDING, communicator.world_size, 0, slow))
        return points

    def measure(self, spec: TrialSpec, *, repeats: int, budget_s: float) -> RankReport:
        """See ``measure_rank``."""
        return measure_rank(spec, self._communicator, repeats=repeats, budget_s=budget_s)

    def close(self) -> None:
        """Leaves the group."""
        self._communicator.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def bind_to_core(rank: int) -> None:
    """This thread, and all that it starts later, stay on one of the process's cores; ranks take them in turn."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def devices_of(device: str) -> int:
    """GPUs that this process sees, or its cores."""
    return torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))


def joined(
    spec: TrialSpec, found: Sequence[RankReport], device: str, devices: int, calibration: Sequence[Point]
) -> Measurement:
    """One measurement from all ranks': the slowest rank's time of each round, all bytes, the fullest rank's memory.

    Args:
        found: of every rank of one host, or of several, whose spans then all begin at 0.
        devices: cores or GPUs that all ranks together may use.
    """
    reports = sorted(found, key=lambda report: report.rank)
    plan, first = ring_plan(spec), reports[0]
    itemsize = getattr(torch, spec.dtype).itemsize
    sizes = (spec.num_kv_heads or spec.num_heads, spec.head_dim, itemsize, spec.batch)
    forward, both = (_slowest(reports, name) for name in ("forward", "forward_backward"))
    one_clock = device == "cpu" and len({report.host for report in reports}) == 1
    begun = min(report.begun_s for report in reports) if one_clock else None
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
        devices=devices,
        partition=ring_params(spec)[1],
        imbalance=plan.imbalance,
        single_forward_ms_p50=quantiles_of(first.times_ms["single_forward"]).p50,
        single_forward_backward_ms_p50=quantiles_of(first.times_ms["single_forward_backward"]).p50,
        error_forward=first.errors[0],
        error_gradient=first.errors[1],
        device=device,
        device_name=first.device_name,
        num_threads=first.num_threads,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        rank_curves=(*as_points(spans), *calibration),
    )


def _slowest(reports: list[RankReport], name: str) -> Quantiles:
    return quantiles_of([max(times) for times in zip(*(report.times_ms[name] for report in reports), strict=True)])


def _moved(span: Span, seconds: float) -> Span:
    return span._replace(begin_s=span.begin_s + seconds, end_s=span.end_s + seconds)
