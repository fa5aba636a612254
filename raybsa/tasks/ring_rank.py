"""RingRank: one rank of rings that are measured, wherever its process comes from, and how all ranks' reports become one
measurement.

On the CPU ranks talk over gloo. One that computes with one thread is bound to a core, because a scheduler that is left
to itself often wakes several ranks on one core when a barrier lets them go, and leaves them there for some 10 ms while
another core has nothing to do. On CUDA each rank has a GPU, and they talk over NCCL.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist

from raybsa.comm import Communicator, process_group
from raybsa.results.record import Measurement
from raybsa.ring.timeline import Point, Span, as_points
from raybsa.spec import TrialSpec
from raybsa.tasks.ring import RING, RING_LONGEST, RING_PEERS, measure_rank, ring_params, ring_plan
from raybsa.tasks.ring_calibration import measure_crowding, measure_link
from raybsa.tasks.ring_contender import RankReport, ring_layout
from raybsa.tasks.ring_longest import measure_longest
from raybsa.tasks.ring_peers import ON_ONE_DEVICE, measure_ring_peer
from raybsa.tasks.sharded_trial import RankQuality, ShardedTrial, facts_of, plans_of
from raybsa.timing import quantiles_of

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
        bind: a rank that computes with one thread on the CPU stays on its core; else only while a trial is timed, so
            that rings of one host can train beside each other.

    Attributes:
        devices: GPUs that this process sees, or the cores that it had before it was bound to one.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        place: torch.device,
        *,
        num_threads: int = 1,
        bind: bool = True,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.devices = devices_of(place.type)
        self._has_core = place.type == "cpu" and num_threads == 1
        if bind and self._has_core:
            bind_to_core(rank)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        group = process_group(place, store, rank, world_size, TIMEOUT_S)
        self._seat = (rank, world_size, store)
        self._communicator = Communicator(group, device=place, timeout_s=TIMEOUT_S)
        self._trial: ShardedTrial | None = None

    def calibrate(self, spec: TrialSpec) -> list[Point]:
        """The link's timed messages, and how ranks slow each other down in ``spec``'s kernel (nothing of it where the
        question cannot be asked, which it says in its own turn)."""
        communicator, points = self._communicator, self.link()
        with suppress(ValueError):
            slow = measure_crowding(spec, communicator, self.devices)
            points.append((CROWDING, communicator.world_size, 0, slow))
        return points

    def measure(self, spec: TrialSpec, repeats: int, budget_s: float) -> RankReport:
        """See ``measure_rank``, ``measure_ring_peer`` and ``measure_longest``: the task says which."""
        self._tidy()
        if spec.task == RING_LONGEST:
            return measure_longest(spec, self._communicator)
        if spec.task == RING_PEERS:
            mesh = None if spec.layer(0).backend in ON_ONE_DEVICE else self._mesh()
            return measure_ring_peer(spec, self._communicator, mesh, repeats=repeats, budget_s=budget_s)
        return measure_rank(spec, self._communicator, repeats=repeats, budget_s=budget_s)

    # ---- a trial whose sequence is split: see ShardedTrial -------------------------------------------------------

    def link(self) -> list[Point]:
        """The link's timed messages."""
        return [(LINK, nbytes, 0, ms) for nbytes, ms in measure_link(self._communicator)]

    def begin(self, spec: TrialSpec) -> None:
        """Takes up a trial in place of the one before."""
        self._trial = None  # the old model goes before the new one comes
        self._tidy()
        self._trial = ShardedTrial(spec, self._communicator)

    def time(self, repeats: int, budget_s: float) -> RankReport:
        """Measures the trial's attention, from a core of its own where it computes with one thread on the CPU."""
        with bound_to_core(self._communicator.rank) if self._has_core else nullcontext():
            return self._under_way.measure(repeats, budget_s)

    def train(self, until: int) -> None:
        """Trains until so many steps are done."""
        self._under_way.train(until)

    def judge(self) -> RankQuality:
        """The quality as it is."""
        return self._under_way.judge()

    @property
    def _under_way(self) -> ShardedTrial:
        assert self._trial is not None, "begin comes first"
        return self._trial

    # ---- for ourselves ---------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Gives back what an earlier question left in pieces."""
        if self._communicator.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _mesh(self) -> Any:
        """All ranks, as torch's own parallelism wants them: through the process's default group, made at first use."""
        from torch.distributed.device_mesh import init_device_mesh

        device, (rank, world_size, store) = self._communicator.device.type, self._seat
        if not dist.is_initialized():
            own = dist.PrefixStore("mesh", store)
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)
        return init_device_mesh(device, (world_size,))

    def close(self) -> None:
        """Leaves the group."""
        self._communicator.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def bind_to_core(rank: int) -> None:
    """This thread, and all that it starts later, stay on one of the process's cores; ranks take them in turn."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


@contextmanager
def bound_to_core(rank: int) -> Iterator[None]:
    """Meanwhile this thread stays on a core, as by ``bind_to_core``."""
    cores = os.sched_getaffinity(0)
    bind_to_core(rank)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def place_of(device: str, index: int = 0) -> torch.device:
    """A GPU that this process sees, or the CPU."""
    return torch.device(device, index) if device == "cuda" else torch.device(device)


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
    first = reports[0]
    one_clock = device == "cpu" and len({report.host for report in reports}) == 1
    begun = min(report.begun_s for report in reports) if one_clock else None
    spans = [_moved(span, 0.0 if begun is None else r.begun_s - begun) for r in reports for span in r.spans]
    return Measurement(
        **_facts(spec, reports),
        **_quantiles(reports, "forward"),
        **_quantiles(reports, "forward_backward"),
        peak_bytes=max(report.peak_bytes for report in reports),
        world_size=len(reports),
        devices=devices,
        single_forward_ms_p50=_of_rank_0(first, "single_forward"),
        single_forward_backward_ms_p50=_of_rank_0(first, "single_forward_backward"),
        error_forward=first.errors and first.errors[0],
        error_gradient=first.errors and first.errors[1],
        device=device,
        device_name=first.device_name,
        num_threads=first.num_threads,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        rank_curves=(*as_points(spans), *calibration),
    )


def _facts(spec: TrialSpec, reports: Sequence[RankReport]) -> dict[str, Any]:
    """What our ring sent, and what its plans knew; of another library's the density alone."""
    if spec.task in (RING_PEERS, RING_LONGEST):
        return {"density": ring_layout(spec).density}
    sent = {
        "wire_bytes": sum(report.forward_backward_bytes for report in reports),
        "wire_forward_bytes": sum(report.forward_bytes for report in reports),
    }
    if spec.task == RING:
        return sent | facts_of(spec, [ring_plan(spec)]) | {"partition": ring_params(spec)[1]}
    return sent | facts_of(spec, plans_of(spec)) | {"partition": spec.ranks.partition}


def _of_rank_0(report: RankReport, name: str) -> float | None:
    return quantiles_of(report.times_ms[name]).p50 if name in report.times_ms else None


def _quantiles(reports: Sequence[RankReport], step: str) -> dict[str, Any]:
    """Columns of a step's milliseconds: quantiles over the rounds, of each its slowest rank; none where not timed."""
    if step not in reports[0].times_ms:
        return {}
    rounds = zip(*(report.times_ms[step] for report in reports), strict=True)
    found = quantiles_of([max(times) for times in rounds])
    return {f"{step}_ms_p20": found.p20, f"{step}_ms_p50": found.p50, f"{step}_ms_p80": found.p80}


def _moved(span: Span, seconds: float) -> Span:
    return span._replace(begin_s=span.begin_s + seconds, end_s=span.end_s + seconds)
