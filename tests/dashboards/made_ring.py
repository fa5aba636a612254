"""Ring results made in memory: what a known machine would take, by the cost formula."""

from __future__ import annotations

from dataclasses import replace

from raybsa.experiments.forecast import sizes_of
from raybsa.results.record import Record, SeriesPoint
from raybsa.ring.cost import predict
from raybsa.ring.hardware import Hardware, Kernel, Link, Pass
from raybsa.ring.timeline import Span, as_points
from raybsa.ring.work import work_of
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.ring import ring_plan
from raybsa.tasks.ring_rank import LINK
from tests.dashboards.made import record

MACHINE = Hardware(
    "two cores",
    (Kernel(Pass.FORWARD, 64, 3e10, 0.4, 2e-4), Kernel(Pass.BACKWARD, 64, 2e10, 0.4, 4e-4)),
    Link(3e-4, 2e9),
    devices=2,
)


def ring_spec(
    world_size: int,
    seq_len: int = 2048,
    density: float | None = 0.2,
    partition: str = "balanced",
    family: str = "sink_window",
) -> TrialSpec:
    return TrialSpec(
        "ring",
        (AttentionSpec("distributed", PatternSpec(family), density, 64),),
        seq_len=seq_len,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        task_params={"world_size": world_size, "partition": partition},
    )


def ring_record(trial_id: str, spec: TrialSpec, **values: object) -> Record:
    """A row whose times are exactly the formula's on ``MACHINE``."""
    params = dict(spec.task_params)
    alone = replace(spec, task_params={**params, "world_size": 1})
    plan = ring_plan(spec)
    own, single = (predict(work_of(p), sizes_of(spec), MACHINE) for p in (plan, ring_plan(alone)))
    measured = {
        "job": "benchmark",
        "density": plan.layout.density,
        "forward_ms_p50": 1e3 * own.forward_s,
        "forward_backward_ms_p50": 1e3 * own.forward_backward_s,
        "single_forward_ms_p50": 1e3 * single.forward_s,
        "single_forward_backward_ms_p50": 1e3 * single.forward_backward_s,
        "world_size": params["world_size"],
        "partition": params["partition"],
        "devices": 2,
        "num_threads": 1,
        "device_name": "Intel Xeon, 2 cores",
        "imbalance": plan.imbalance,
        "wire_forward_bytes": own.forward_bytes,
        "needed_forward_bytes": own.forward_bytes,
        "wire_bytes": own.forward_backward_bytes,
        "peak_bytes": own.memory_bytes + (1 << 20),
        "error_forward": 2e-7,
        "error_gradient": 3e-7,
    }
    return record(trial_id, spec, **(measured | values))


def a_ring_benchmark() -> list[Record]:
    """Three lengths and a second density over 1, 2 and 4 ranks, and a partition that only several ranks have."""
    asked = [(n, 0.2, "balanced") for n in (2048, 4096, 8192)] + [(4096, 0.3, "balanced"), (4096, 0.2, "contiguous")]
    return [
        ring_record(f"ring-{n}-{density}-{partition}-{world}", ring_spec(world, n, density, partition))
        for n, density, partition in asked
        for world in (1, 2, 4)
        if world > 1 or partition == "balanced"
    ]


def link_points(trial_id: str) -> list[SeriesPoint]:
    """Messages as ``MACHINE`` carries them."""
    return [SeriesPoint(trial_id, LINK, 1 << i, 0, 1e3 * (3e-4 + (1 << i) / 2e9)) for i in range(12, 23, 2)]


def step_spans() -> list[Span]:
    """Two ranks and one hop, 10 ms: 4 + 4 of compute, 5 of a transfer of which rank 1 waits 1."""
    spans = []
    for rank in (0, 1):
        spans += [
            Span(rank, "transfer", "kv", 1, 0.0, 0.005),
            Span(rank, "forward", "attention", 0, 0.0, 0.004),
            Span(rank, "backward", "attention", 1, 0.006, 0.010),
        ]
    return [*spans, Span(1, "wait", "kv", 1, 0.004, 0.005), Span(0, "wait", "the ring's call", 0, 0.0, 0.001)]


def step_points(trial_id: str) -> list[SeriesPoint]:
    return [SeriesPoint(trial_id, *point) for point in as_points(step_spans())]
