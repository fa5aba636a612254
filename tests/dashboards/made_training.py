"""Trainings made in memory: compressed gradients, and one that survived two failures."""

from __future__ import annotations

from raybsa.results.record import Record, SeriesPoint
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from tests.dashboards.made import record


def compressed(trial_id: str, codec: dict | str, bits: float, sent: int, seed: int = 0) -> Record:
    params = {"codec": codec, "warmup_steps": 0, "world_size": 2, "train_batch": 4}
    spec = TrialSpec("compression", (AttentionSpec("dense"),), train_steps=100, seed=seed, task_params=params)
    return record(trial_id, spec, quality=bits, quality_goal="min", wire_bytes=sent, train_seconds=5.0)


RANK_2 = {"name": "powersgd", "params": {"rank": 2}}
TRAININGS = [
    compressed("a", "none", 2.0, 1000 << 20),
    compressed("b", RANK_2, 2.02, 20 << 20),
    compressed("c", "none", 4.0, 1000 << 20, seed=1),
    compressed("d", RANK_2, 4.12, 20 << 20, seed=1),
    compressed("e", RANK_2, 9.0, 20 << 20, seed=2),
]
LOSSES = [SeriesPoint(t.trial_id, "train_loss", step, 0, 3.0 - step / 10) for t in TRAININGS for step in range(4)]


RECOVERED = record(
    "t",
    TrialSpec(
        "byte_lm",
        (AttentionSpec("distributed", PatternSpec("bigbird"), 0.5, 16),),
        train_len=100,
        task_params={"train_batch": 2},
    ),
    quality=None,
    failures_survived=2,
    world_size=4,
)
TIMES = {"noticed_at": 102.0, "filled_at": 102.1, "formed_at": 102.4, "resumed_at": 102.5}
SERIES = [
    *(SeriesPoint("t", "applied_at", step, 0, at) for step, at in enumerate((100.0, 100.5, 103.0, 103.5))),
    SeriesPoint("t", "recovery_struck_at", 0, 0, 101.9),
    *(SeriesPoint("t", f"recovery_{name}", 0, 0, at) for name, at in TIMES.items()),
    *(SeriesPoint("t", f"recovery_{name}", 1, 0, at + 10) for name, at in TIMES.items()),
]
