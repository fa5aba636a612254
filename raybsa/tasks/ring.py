"""What one rank of a ring measures: its steps, one process with the whole sequence in turn, bytes, and a timeline.

Every rank runs the same calls in the same order. A step is timed on each rank from a barrier to its own end; the
slowest rank's time is the step's (``ring_rank`` joins the reports). The single process is rank 0 alone with the same
kernel, while the others wait.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raybsa import patterns
from raybsa.comm import Communicator
from raybsa.kernels.api import block_sparse_attention
from raybsa.layout import BlockLayout
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import RingPlan
from raybsa.ring.timeline import Span, Timeline
from raybsa.spec import TrialSpec
from raybsa.tasks.params import known_params
from raybsa.tasks.speed import synthetic_qkv
from raybsa.timing import device_name, forward_backward_call, forward_call, peak_bytes, quantiles_of

PARAMS = {"world_size": 1, "partition": "balanced"}
STEPS = ("forward", "forward_backward", "single_forward", "single_forward_backward")
_WARMUP = 3
_CROWDING_MS = 100.0
_CALIBRATION = "timing"  # the ledger's word for what only the measurement sends


@dataclass
class RankReport:
    """What one rank saw, and where. Milliseconds by step and round, rank 0's alone for ``single_*``."""

    rank: int
    host: str
    device_name: str
    num_threads: int
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    forward_bytes: int = 0
    forward_backward_bytes: int = 0
    peak_bytes: int = 0
    errors: tuple[float, float] | None = None
    spans: list[Span] = field(default_factory=list)
    begun_s: float = 0.0


def ring_params(spec: TrialSpec) -> tuple[int, str]:
    """(world_size, partition) that a ring trial asks for. Raises ValueError for parameters that it does not know."""
    if spec.task != "ring" or spec.layer(0).pattern is None or spec.num_layers != 1:
        raise ValueError("a ring measures one layer with a pattern, in task 'ring'")
    params = known_params(spec, PARAMS)
    if params["world_size"] < 1:
        raise ValueError(f"a ring has at least one rank, got world_size {params['world_size']}")
    return params["world_size"], params["partition"]


def ring_layout(spec: TrialSpec, device: torch.device | str = "cpu") -> BlockLayout:
    """The layout of the whole sequence."""
    attention = spec.layer(0)
    assert attention.pattern is not None
    return patterns.build(attention.pattern).layout(
        spec.seq_len,
        num_heads=spec.num_heads,
        q_block_size=attention.block_size,
        causal=spec.causal,
        density=attention.density,
        device=device,
    )


def ring_plan(spec: TrialSpec, device: torch.device | str = "cpu") -> RingPlan:
    """The plan that every rank of the trial makes."""
    world_size, partition = ring_params(spec)
    layout = ring_layout(spec, device)
    queries_per_kv = spec.num_heads // (spec.num_kv_heads or spec.num_heads)
    dealt = partition_for([layout], world_size, strategy=partition)
    return RingPlan(layout, dealt, queries_per_kv=queries_per_kv)


def measure_rank(
    spec: TrialSpec, communicator: Communicator, *, repeats: int = 20, budget_s: float = 2.0
) -> RankReport:
    """Measures one trial; every rank of the communicator calls it.

    Args:
        repeats: rounds of all four steps; fewer, but at least 3, where a round's duration says that they would take
            over ``budget_s`` seconds.
    """
    device, rank = communicator.device, communicator.rank
    plan = ring_plan(spec, device)
    whole = synthetic_qkv(spec, device)
    mine = tuple(plan.partition.shard(x, rank).contiguous() for x in whole)
    backend = spec.layer(0).backend

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ring_attention(q, k, v, plan, communicator, backend=backend)

    def single(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_sparse_attention(q, k, v, plan.layout, backend=backend)

    calls: dict[str, Callable[[], object]] = {
        "forward": forward_call(ring, mine),
        "forward_backward": forward_backward_call(ring, mine),
        "single_forward": forward_call(single, whole),
        "single_forward_backward": forward_backward_call(single, whole),
    }
    report = RankReport(rank, socket.gethostname(), device_name(device), torch.get_num_threads())
    if rank == 0:
        report.errors = _errors(calls, plan)
    else:
        _join_in(calls)
    report.times_ms = _rounds(calls, communicator, repeats, budget_s)
    report.forward_bytes = _bytes_sent(calls["forward"], communicator)
    report.forward_backward_bytes = _bytes_sent(calls["forward_backward"], communicator)
    report.spans, report.begun_s = _timeline(calls["forward_backward"], communicator)
    communicator.barrier(_CALIBRATION)
    report.peak_bytes = peak_bytes(calls["forward_backward"], device)
    communicator.settle()
    return report


def measure_link(communicator: Communicator, *, repeats: int = 9) -> list[tuple[int, float]]:
    """(bytes, milliseconds) of messages to the next rank while one comes from the rank before, medians."""
    if communicator.world_size == 1:
        return []
    rank, world = communicator.rank, communicator.world_size
    largest = 28 if communicator.device.type == "cuda" else 22
    found = []
    for exponent in range(12, largest + 1, 2):
        sent = torch.zeros(1 << exponent, dtype=torch.uint8, device=communicator.device)
        received, times = torch.empty_like(sent), []

        def call(sent: Tensor = sent, received: Tensor = received) -> None:
            peers = {(rank + 1) % world: sent}, {(rank - 1) % world: received}
            communicator.exchange(_CALIBRATION, *peers).wait()

        for _ in range(_WARMUP + repeats):
            times.append(_timed(call, communicator))
        found.append((1 << exponent, quantiles_of(times[_WARMUP:]).p50))
    return found


def measure_crowding(spec: TrialSpec, communicator: Communicator, devices: int, *, repeats: int = 5) -> float:
    """How many times slower the kernel is where all ranks run it at once than where rank 0 does alone; no ring.

    One measurement is as many calls as take rank 0 some 100 ms, so that the ranks' calls do meet; the slowest rank
    counts. On the CPU it is processor time, which the host's other processes and a scheduler that leaves two ranks on
    one core do not change, and ranks beyond ``devices`` take turns.

    Args:
        devices: how many ranks compute at once: cores or GPUs.
    """
    layout, backend = ring_layout(spec, communicator.device), spec.layer(0).backend
    inputs = synthetic_qkv(spec, communicator.device)
    clock = time.perf_counter if communicator.device.type == "cuda" else time.thread_time

    def single(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_sparse_attention(q, k, v, layout, backend=backend)

    once = forward_call(single, inputs)
    once_ms = [_timed(once, communicator, clock=clock) for _ in range(_WARMUP)][-1]
    calls = calls_within(_CROWDING_MS, _from_all(once_ms, communicator)[0])

    def call() -> None:
        for _ in range(calls):
            once()

    alone, together = [], []
    for _ in range(repeats):
        if communicator.rank == 0:
            alone.append(_timed(call, communicator, together=False, clock=clock))
        communicator.barrier(_CALIBRATION)
        together.append(max(_from_all(_timed(call, communicator, clock=clock), communicator)))
    pace = quantiles_of(together).p50 / quantiles_of(alone).p50 if communicator.rank == 0 else 1.0
    return pace * max(1.0, communicator.world_size / devices)


def calls_within(limit_ms: float, call_ms: float) -> int:
    """How many calls of ``call_ms`` take at least ``limit_ms``."""
    return max(1, math.ceil(limit_ms / call_ms))


def _from_all(number: float, communicator: Communicator) -> list[float]:
    """Every rank's number, in rank order."""
    mine = torch.tensor([number], dtype=torch.float64, device=communicator.device)
    return [float(x) for x in communicator.all_gather(_CALIBRATION, mine)]


def _rounds(
    calls: dict[str, Callable[[], object]], communicator: Communicator, repeats: int, budget_s: float
) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; rank 0 is alone in those of the single process."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, begin = 1, time.perf_counter()
    while len(times["forward"]) < rounds:
        for name, call in calls.items():
            alone = name.startswith("single")
            if not alone or communicator.rank == 0:
                times[name].append(_timed(call, communicator, together=not alone))
            communicator.barrier(_CALIBRATION)
        if len(times["forward"]) == 1:
            slowest = max(_from_all(time.perf_counter() - begin, communicator))
            rounds = max(3, min(repeats, int(budget_s / slowest)))
    return times


def _timed(
    call: Callable[[], object],
    communicator: Communicator,
    together: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    if together:
        communicator.barrier(_CALIBRATION)
    _settle(communicator)
    begin = clock()
    call()
    _settle(communicator)
    return (clock() - begin) * 1e3


def _settle(communicator: Communicator) -> None:
    if communicator.device.type == "cuda":
        communicator.settle()
        torch.cuda.synchronize(communicator.device)


def _bytes_sent(call: Callable[[], object], communicator: Communicator) -> int:
    """What this rank puts on the wire in one call, by the communicator's own count."""
    communicator.ledger.clear()
    call()
    _settle(communicator)
    return sum(communicator.ledger.sent[kind] for kind in ("kv", "kv_gradient"))


def _timeline(call: Callable[[], object], communicator: Communicator) -> tuple[list[Span], float]:
    """The spans of one step, in seconds from this rank's first, and that first one's ``perf_counter``."""
    timeline = Timeline(communicator.rank, communicator.device)
    communicator.barrier(_CALIBRATION)
    _settle(communicator)
    communicator.observer, begun = timeline, time.perf_counter()
    try:
        call()
        _settle(communicator)
    finally:
        communicator.observer = None
    return timeline.spans(begun), begun


def _errors(calls: dict[str, Callable[[], Any]], plan: RingPlan) -> tuple[float, float]:
    """(forward, gradient) of rank 0's tokens against the single process."""
    shard = plan.partition.shard
    forward = _relative(calls["forward"](), shard(calls["single_forward"](), 0))
    wanted = [shard(x, 0) for x in calls["single_forward_backward"]()]
    return forward, max(map(_relative, calls["forward_backward"](), wanted))


def _join_in(calls: dict[str, Callable[[], object]]) -> None:
    """The other ranks' part in rank 0's check."""
    calls["forward"]()
    calls["forward_backward"]()


def _relative(found: Tensor, wanted: Tensor) -> float:
    largest = float(wanted.double().abs().max())
    return float((found.double() - wanted.double()).abs().max()) / (largest or 1.0)
