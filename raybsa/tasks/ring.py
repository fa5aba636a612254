"""What one rank of a ring measures: its steps, one process with the whole sequence in turn, bytes, and a timeline.

Every rank runs the same calls in the same order. A step is timed on each rank from a barrier to its own end; the
slowest rank's time is the step's (``ring_rank`` joins the reports). The single process is rank 0 alone with the same
kernel, while the others wait. Without it (``single: false``) the ring is compared with the reference on a small case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.kernels.api import block_sparse_attention
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import RingPlan
from raybsa.ring.timeline import Span, Timeline
from raybsa.spec import TrialSpec
from raybsa.tasks.params import known_params
from raybsa.tasks.ring_contender import (
    Contender,
    RankReport,
    calls_of,
    errors_of,
    reference_errors,
    report_of,
    ring_layout,
    small_of,
)
from raybsa.tasks.ring_rounds import MEASURING, rounds, settle
from raybsa.timing import peak_bytes

RING, RING_PEERS, RING_LONGEST = "ring", "ring_peers", "ring_longest"  # tasks
PARAMS = {"world_size": 1, "partition": "balanced", "single": True}


def ring_params(spec: TrialSpec) -> tuple[int, str]:
    """(world_size, partition) that a ring trial asks for. Raises ValueError for parameters that it does not know."""
    if not spec.task.startswith(RING) or spec.layer(0).pattern is None or spec.num_layers != 1:
        raise ValueError(f"a ring measures one layer with a pattern, in task 'ring', got task {spec.task!r}")
    params = known_params(spec, PARAMS)
    if params["world_size"] < 1:
        raise ValueError(f"a ring has at least one rank, got world_size {params['world_size']}")
    return params["world_size"], params["partition"]


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
        repeats: rounds of all steps; fewer, but at least 3, where a round's duration says that they would take over
            ``budget_s`` seconds.
    """
    plan = ring_plan(spec, communicator.device)
    contender = own_ring(spec, plan, communicator)
    calls = calls_of(contender, spec, communicator)
    report = report_of(communicator)
    if contender.alone is None:
        small = small_of(spec, communicator.world_size)
        checked = own_ring(small, ring_plan(small, communicator.device), communicator)
        report.errors = reference_errors(checked, small, communicator)
        _join_in(calls)
    elif communicator.rank == 0:
        report.errors = errors_of(calls, calls, contender.tokens)
    else:
        _join_in(calls)
    time_and_count(report, calls, communicator, repeats=repeats, budget_s=budget_s)
    report.spans, report.begun_s = _timeline(calls["forward_backward"], communicator)
    return report


def time_and_count(
    report: RankReport,
    calls: Mapping[str, Callable[[], object]],
    communicator: Communicator,
    *,
    repeats: int,
    budget_s: float,
) -> None:
    """Fills in times, bytes sent and memory of this rank's steps, which are warm; every rank calls it."""
    report.times_ms = rounds(calls, communicator, repeats, budget_s)
    report.forward_bytes = _bytes_sent(calls["forward"], communicator)
    report.forward_backward_bytes = _bytes_sent(calls["forward_backward"], communicator)
    communicator.barrier(MEASURING)
    report.peak_bytes = peak_bytes(calls["forward_backward"], communicator.device)
    communicator.settle()


def own_ring(spec: TrialSpec, plan: RingPlan, communicator: Communicator) -> Contender:
    """Our ring by a plan, and one process with the same kernel unless the trial says ``single: false``."""
    backend = spec.layer(0).backend

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ring_attention(q, k, v, plan, communicator, backend=backend)

    def single(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_sparse_attention(q, k, v, plan.layout, backend=backend)

    with_single = known_params(spec, PARAMS)["single"]
    return Contender(plan.partition.tokens(communicator.rank), ring, single if with_single else None)


def _bytes_sent(call: Callable[[], object], communicator: Communicator) -> int:
    """What this rank puts on the wire in one call, by the communicator's own count."""
    communicator.ledger.clear()
    call()
    settle(communicator)
    return sum(communicator.ledger.sent[kind] for kind in ("kv", "kv_gradient"))


def _timeline(call: Callable[[], object], communicator: Communicator) -> tuple[list[Span], float]:
    """The spans of one step, in seconds from this rank's first, and that first one's ``perf_counter``."""
    timeline = Timeline(communicator.rank, communicator.device)
    communicator.barrier(MEASURING)
    settle(communicator)
    communicator.observer, begun = timeline, time.perf_counter()
    try:
        call()
        settle(communicator)
    finally:
        communicator.observer = None
    return timeline.spans(begun), begun


def _join_in(calls: Mapping[str, Callable[[], object]]) -> None:
    """The other ranks' part in rank 0's check; else a step to get warm."""
    calls["forward"]()
    calls["forward_backward"]()
