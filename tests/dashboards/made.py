"""Results made in memory: records as the jobs write them, with numbers that are known in advance."""

from __future__ import annotations

import math
from dataclasses import replace

from raybsa.results.record import Record, SeriesPoint
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec, canonical_json

DENSE = AttentionSpec("dense")


def sparse(name: str, density: float | None = 0.1, **params: object) -> AttentionSpec:
    return AttentionSpec("base", PatternSpec(name, params), density)


def record(trial_id: str, spec: TrialSpec, **values: object) -> Record:
    """A finished trial's record; ``values`` replace any of its fields."""
    first = spec.layer(0)
    made = Record(
        trial_id=trial_id,
        run_id="run-1",
        job="search",
        created_at=f"2026-03-01T10:{len(trial_id):02d}:00+00:00",
        status="ok",
        error=None,
        spec=canonical_json(spec.to_dict()),
        spec_hash=spec.digest,
        seed=spec.seed,
        task=spec.task,
        variant=first.variant,
        pattern=first.pattern.name if first.pattern else "dense",
        block_size=first.block_size,
        density=first.density if first.pattern else 1.0,
        seq_len=spec.seq_len,
        train_len=None if spec.task == "speed" else spec.train_len,
        batch=spec.batch,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        causal=spec.causal,
        dtype=spec.dtype,
        backend="blocked" if first.pattern else "sdpa",
        device="cpu",
        device_name="Intel Xeon, 2 cores",
        num_threads=2,
        torch_version="2.13.0",
        ray_version="2.60.0",
        python_version="3.11.2",
        raybsa_version="0.1.0",
        git_commit="0123456789abcdef",
    )
    return replace(made, **values)


def lm_failure(trial_id: str, attention: AttentionSpec, error: str) -> Record:
    """A byte_lm trial that measured nothing."""
    return record(trial_id, TrialSpec("byte_lm", (attention,)), status="failed", error=error)


def lm_record(trial_id: str, attention: AttentionSpec, quality: float, milliseconds: float, **values: object) -> Record:
    """A byte_lm trial: bits per byte, and forward + backward in milliseconds (dense: 40 ms)."""
    spec = TrialSpec("byte_lm", (attention,))
    measured = {
        "quality_name": "bits_per_byte",
        "quality_goal": "min",
        "quality": quality,
        "forward_ms_p50": milliseconds / 3,
        "forward_backward_ms_p50": milliseconds,
        "dense_forward_ms_p50": 12.0,
        "dense_forward_backward_ms_p50": 40.0,
        "peak_bytes": int((8 + milliseconds) * (1 << 20)),
        "dense_peak_bytes": 64 << 20,
    }
    return record(trial_id, spec, **(measured | values))


def speed_record(trial_id: str, attention: AttentionSpec, seq_len: int, **values: object) -> Record:
    """A benchmark trial that takes twice the ideal time; dense takes 100 ms at 4,096 tokens, growing with n²."""
    dense = 100.0 * (seq_len / 4096) ** 2
    own = dense if attention.pattern is None else 2 * dense * (attention.density or 0.5)
    spec = TrialSpec("speed", (attention,), seq_len=seq_len, num_heads=8, head_dim=64)
    measured = {
        "job": "benchmark",
        "forward_ms_p20": 0.95 * own,
        "forward_ms_p50": own,
        "forward_ms_p80": 1.1 * own,
        "forward_backward_ms_p20": 2.8 * own,
        "forward_backward_ms_p50": 3 * own,
        "forward_backward_ms_p80": 3.3 * own,
        "dense_forward_ms_p50": dense,
        "dense_forward_backward_ms_p50": 3 * dense,
        "peak_bytes": int(seq_len * 8192 * (1 + (attention.density or 1))),
        "dense_peak_bytes": seq_len * 16384,
        "error_forward": 3e-7,
        "error_gradient": 8e-7,
    }
    return record(trial_id, spec, **(measured | values))


def curve(trial_id: str, name: str, last: float, steps: int = 200) -> list[SeriesPoint]:
    """A loss that falls from 8 towards ``last``."""
    return [
        SeriesPoint(trial_id, name, step, 0, last + (8 - last) * math.exp(-step / 35))
        for step in range(0, steps + 1, 10)
    ]


FAMILIES: tuple[tuple[str, dict], ...] = (
    ("sliding_window", {}),
    ("bigbird", {}),
    ("sink_window", {}),
    ("dilated", {}),
    ("random", {}),
    ("butterfly", {}),
)


def a_search() -> tuple[list[Record], list[SeriesPoint]]:
    """A dense baseline, six families at three densities, and two failures."""
    records = [lm_record("dense", DENSE, 2.21, 40.0)]
    for index, (family, params) in enumerate(FAMILIES):
        for density in (0.05, 0.1, 0.25):
            quality = (
                2.23 + 0.03 * (index % 4) + 0.15 * (0.5 - density) ** 2 + 0.02 * math.sin(7 * index + 40 * density)
            )
            milliseconds = 4 + 60 * density + 1.3 * index % 5
            name = f"{family}-{density}"
            records.append(lm_record(name, sparse(family, density, **params), quality, milliseconds))
    curves = [point for r in records for point in curve(r.trial_id, "bits_per_byte", r.quality or 0)]
    curves += [point for r in records for point in curve(r.trial_id, "train_loss", 0.65 * (r.quality or 0))]
    hostile = "<script>document.body.dataset.hacked = 'error text'</script>"
    records.append(lm_failure("failed-1", sparse("strided", 0.1), f"ValueError: {hostile}"))
    records.append(lm_failure("failed-2", sparse("no_such", 0.1), "WorkerDied: actor 7 was killed"))
    hostile = "<script>document.body.dataset.hacked = 'pattern name'</script><b>x</b>"
    records.append(lm_record("hostile", sparse(hostile, 0.1), 2.225, 9.0))
    return records, curves


def a_benchmark() -> list[Record]:
    """Two families at four lengths and three densities."""
    return [
        speed_record(f"speed-{family}-{density}-{length}", sparse(family, density), length)
        for family in ("sliding_window", "bigbird")
        for density in (0.03, 0.1, 0.25)
        for length in (1024, 2048, 4096, 8192)
    ]
