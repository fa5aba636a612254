"""Metrics of trainings and trials, as Ray exports them to Prometheus; ``deploy/grafana.json`` draws them.

Prometheus knows them as ``ray_`` and the name, a counter's ending in ``_total``. Ray adds the node and the session.
They may be told in any process, also one that has joined no cluster: then nobody hears of them.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from raybsa.comm import all_reduce_nbytes
from raybsa.gradients.wire import KIND as GRADIENT
from raybsa.results.record import Record

STEP_SECONDS = Histogram(
    "raybsa_step_seconds",
    "Seconds that a rank took for one training step, from its forward to the changed weights",
    boundaries=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0],
    tag_keys=("run", "rank"),
)
SENT_BYTES = Counter("raybsa_sent_bytes", "Bytes that a rank sent, by what they were", tag_keys=("run", "rank", "kind"))
COMPRESSION_RATIO = Gauge(
    "raybsa_compression_ratio",
    "Bytes of an uncompressed all-reduce of the gradients / bytes of gradients that a rank sent for the last step",
    tag_keys=("run", "rank"),
)
REBUILDS = Counter(
    "raybsa_rebuilds", "Times that a ring was formed again, by how it was filled", tag_keys=("run", "filled")
)
TRIALS = Counter("raybsa_trials", "Trials that ended, by how", tag_keys=("run", "job", "status"))
ALL = (STEP_SECONDS, SENT_BYTES, COMPRESSION_RATIO, REBUILDS, TRIALS)


class StepMetrics:
    """Tells of one rank's steps in one generation.

    Args:
        run: the run's id.
        rank, world_size: its place.
        gradient_nbytes: of all gradients, uncompressed.
    """

    def __init__(self, run: str, rank: int, world_size: int, gradient_nbytes: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._whole = all_reduce_nbytes(gradient_nbytes, world_size)
        self._sent: Counts[str] = Counts()

    def step(self, seconds: float, sent: Mapping[str, int]) -> None:
        """After a step. ``sent``: bytes by kind since the generation began."""
        STEP_SECONDS.observe(seconds, self._tags)
        since = Counts(sent) - self._sent
        self._sent = Counts(sent)
        for kind, nbytes in since.items():
            SENT_BYTES.inc(nbytes, self._tags | {"kind": kind})
        if since[GRADIENT]:
            COMPRESSION_RATIO.set(self._whole / since[GRADIENT], self._tags)


def count_trial(record: Record) -> None:
    """A trial ended."""
    TRIALS.inc(1, {"run": record.run_id, "job": record.job, "status": record.status})
